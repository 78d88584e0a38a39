from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.mesh import Node, TestPod
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


@pytest.fixture
def make_pod(node: Node) -> Iterator[Callable[..., TestPod]]:
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
