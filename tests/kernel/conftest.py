from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.mesh import Node, TestPod, Worker
from tests.requirements import require_root

_hosts = itertools.count(10)
_identities = itertools.count(100)


@pytest.fixture(scope="package")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Programs loaded once; what tests do to it they undo, or it is told by addresses and identities of their own.

    This process is in the cgroup of its agent meanwhile: for the tests of this folder only.
    """
    require_root()
    node = Node(Path(tmp_path_factory.mktemp("kernel")))
    yield node
    node.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Modules say by ``FAMILIES`` which families their tests are for, a test by the marker ``families``."""
    marker = metafunc.definition.get_closest_marker("families")
    families = marker.args if marker is not None else getattr(metafunc.module, "FAMILIES", ())
    if families and "family" in metafunc.fixturenames:
        metafunc.parametrize("family", families, indirect=True)


@pytest.fixture
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What pods' addresses are of, and how they are dialled: ``ipv4``, ``ipv6``, or ``mapped`` (IPv4 through IPv6 sockets)."""
    name: str = getattr(request, "param", "ipv4")
    monkeypatch.setattr(Worker, "ipv6", name == "ipv6")
    monkeypatch.setattr(Worker, "mapped", name == "mapped")
    return name


@pytest.fixture
def make_pod(node: Node, family: str) -> Iterator[Callable[..., TestPod]]:
    """Pods of addresses and identities that no other test has."""
    pods: list[TestPod] = []

    def make(*, address: str | None = None) -> TestPod:
        host = next(_hosts)
        pod = TestPod(node, address or f"10.77.{host // 200 + 1}.{host % 200 + 10}", next(_identities))
        pods.append(pod)
        return pod

    yield make
    for pod in pods:
        pod.close()
