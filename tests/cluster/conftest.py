"""A real cluster for tests: the lab's own, or somebody's.

``MYCEL_KUBECONFIG=FILE``
    the same tests on a cluster of somebody's own. Images are the operator's to bring there (``mycel.io/...``, or
    ``MYCEL_APPS_IMAGE`` for the tests' small servers); what needs the nodes' machines is skipped by name.
``MYCEL_CLUSTER=NAME``
    on a cluster of the lab that is up already (``python -m lab.kubernetes up --name NAME --keep``): for work on one test.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.kubernetes import Cluster, Kubernetes
from lab.kubernetes.mesh import Mesh
from tests.cluster.apps import DRAIN, Apps
from tests.requirements import require_root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    if here:
        # It wants a cluster without the mesh and leaves one: first, the cluster need not be another.
        first = items.index(here[0])
        here.sort(key=lambda item: item.path.name != "test_installation.py")
        items[first : first + len(here)] = here
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.privileged)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Kubernetes]:
    """A running cluster, through its API: ``kubectl``, ``get``, ``apply``, ``client``."""
    if own := os.environ.get("MYCEL_KUBECONFIG"):
        yield Kubernetes(Path(own))
    else:
        yield request.getfixturevalue("_lab_cluster")


@pytest.fixture(scope="session")
def lab_cluster(request: pytest.FixtureRequest) -> Cluster:
    """The same cluster with its machines: ``nodes``, ``control_plane``, ``load``. Skips on somebody's own cluster."""
    if os.environ.get("MYCEL_KUBECONFIG"):
        pytest.skip("needs the nodes' machines, and MYCEL_KUBECONFIG is somebody's own cluster")
    found: Cluster = request.getfixturevalue("_lab_cluster")
    return found


@pytest.fixture(scope="session")
def _lab_cluster() -> Iterator[Cluster]:
    if name := os.environ.get("MYCEL_CLUSTER"):
        yield Cluster.attach(name)
        return
    require_root()
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def images(cluster: Kubernetes) -> None:
    """Our images, of this checkout, are on every node."""
    if not os.environ.get("MYCEL_INSTALLED"):
        Mesh(cluster).load_images()


@pytest.fixture(scope="session")
def mesh(cluster: Kubernetes, images: None) -> Mesh:
    """Mycel, installed on ``cluster`` for the rest of the run (``MYCEL_INSTALLED=1``: it is there, and stays as it is)."""
    mesh = Mesh(cluster, values=[f"{part}.drainSeconds={DRAIN}" for part in ("nodeproxy", "l7proxy")])
    if not os.environ.get("MYCEL_INSTALLED"):
        mesh.install(crds=("istio", "gateway-api", "linkerd", "smi"))
    return mesh


@pytest.fixture
def namespace(cluster: Kubernetes) -> Iterator[str]:
    """A new namespace, outside of the mesh, deleted at the end (nobody waits for that)."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    try:
        yield name
    finally:
        cluster.kubectl("delete", "namespace", name, "--wait=false", check=False)


@pytest.fixture
def apps(cluster: Kubernetes, namespace: str) -> Apps:
    """Small servers and clients in a namespace of the test's own."""
    return Apps(cluster, namespace)
