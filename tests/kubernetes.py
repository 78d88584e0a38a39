"""Fixtures that need a real API server but no nodes: ``api_server``, three seconds once for a run, and what it has is shared.

Whoever uses it makes namespaces of their own (``api_namespace``) and takes away what is not in one.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from lab.kubernetes import ControlPlane
from tests.requirements import require_root


@pytest.fixture(scope="session")
def api_server() -> Iterator[ControlPlane]:
    """A kube-apiserver (and etcd) on loopback, with RBAC: ``.kubeconfig`` (administrator), ``.url``, ``.kubectl(...)``."""
    require_root()
    with ControlPlane() as control_plane:
        yield control_plane


@pytest.fixture
def api_namespace(api_server: ControlPlane) -> str:
    """A new namespace on ``api_server`` with a service account ``default``; it stays to the end of the server.

    No controller runs there: nothing makes what controllers make (EndpointSlices, default service accounts, deletion of
    a namespace's objects). ``ControlPlane(parts=PARTS)`` has them.
    """
    name = f"test-{uuid.uuid4().hex[:8]}"
    api_server.kubectl("create", "namespace", name)
    api_server.kubectl("create", "serviceaccount", "default", "-n", name)
    return name
