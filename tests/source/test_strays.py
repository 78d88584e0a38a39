"""A pod is not handed out before its namespace, whose labels say whether it is in the mesh: two watches, in any order."""

from __future__ import annotations

from typing import Any

import pytest

from common.kubernetes import Access, Client
from controlplane.source import Key
from controlplane.source.collection import Collection
from controlplane.source.kinds import BUILT_IN
from controlplane.source.kubernetes import KubernetesSource


class Cluster:
    """Objects as watches bring them."""

    def __init__(self, source: KubernetesSource) -> None:
        self._source = source
        self._of = {kind.kind: Collection(source._table, kind, kind.version) for kind in BUILT_IN}

    def put(self, kind: str, namespace: str, name: str) -> None:
        self._of[kind].put(_item(namespace, name))

    def remove(self, kind: str, namespace: str, name: str) -> None:
        self._of[kind].remove(_item(namespace, name))

    def pods(self) -> set[str]:
        return {key.name for key in self._source._state().objects if key.kind == "Pod"}


def _item(namespace: str, name: str) -> dict[str, Any]:
    metadata = {"name": name, "uid": f"{namespace}-{name}", "resourceVersion": "1"}
    return {
        "metadata": metadata | ({"namespace": namespace} if namespace else {}),
        "spec": {"containers": []},
    }


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(KubernetesSource(Client(Access(server="https://127.0.0.1:9")), lambda _: []))


def test_a_pod_before_its_namespace(cluster: Cluster) -> None:
    cluster.put("Namespace", "", "default")
    cluster.put("Pod", "default", "known")
    cluster.put("Pod", "new", "early")
    cluster.put("Pod", "new", "gone")
    assert cluster.pods() == {"known"}
    cluster.remove("Pod", "new", "gone")
    cluster.put("Namespace", "", "new")
    assert cluster.pods() == {"known", "early"}
    # A namespace goes after its pods, but the watch of those may be the one that is behind.
    cluster.remove("Namespace", "", "new")
    assert cluster.pods() == {"known", "early"}


def test_where_no_namespace_may_be_read(cluster: Cluster) -> None:
    cluster.put("Pod", "default", "a")
    assert cluster.pods() == {"a"}
    assert Key("", "Namespace", "", "default") not in cluster._source._state().objects
