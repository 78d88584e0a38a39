"""``mycel upgrade`` on a real API server without nodes: what it waits for, what one that stops leaves. (Whole: tests/cluster.)"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest

from cli import install, upgrade
from cli.cluster import Cluster, Json
from common.kubernetes import path_of
from deploy import manifests, parts
from deploy.values import load
from lab.kubernetes import ControlPlane

pytestmark = pytest.mark.privileged


@pytest.fixture
def cluster(api_server: ControlPlane, api_namespace: str) -> Iterator[Cluster]:
    with Cluster(api_namespace, kubeconfig=api_server.kubeconfig) as cluster:
        yield cluster
    for kind in ("validatingwebhookconfiguration", "clusterrole", "clusterrolebinding"):
        api_server.kubectl("delete", kind, "-l", "app.kubernetes.io/name=mycel", "--ignore-not-found")


def test_what_was_chosen_for_an_upgrade_that_stops_is_not_remembered(
    api_server: ControlPlane, cluster: Cluster
) -> None:
    """Going back is ``mycel upgrade`` of the old version: it must not find the choices of the new one."""
    objects = install.objects(load(settings=["trustDomain=shop.example"]), cluster.namespace)
    api_server.kubectl("apply", "--server-side", "-f", "-", input=manifests.to_yaml(objects))
    owner, _, values = upgrade.plan(cluster, (), ["image.repository=nowhere.example"])
    assert owner == "kubectl"
    with pytest.raises(upgrade.UpgradeError, match=r"Deployment .*mycel-controlplane"):
        upgrade.run(cluster, values, owner, upgrade.STEPS, timeout=0.5, say=lambda _: None)

    def image(kind: str, name: str) -> str:
        there = json.loads(api_server.kubectl("get", kind, name, "-n", cluster.namespace, "-o", "json"))
        return str(there["spec"]["template"]["spec"]["containers"][0]["image"])

    assert image("deployment", parts.CONTROLPLANE).startswith("nowhere.example/")
    assert not image("daemonset", parts.AGENT).startswith("nowhere.example/")
    _, _, back = upgrade.plan(cluster, (), ())
    assert back == load(settings=["trustDomain=shop.example"])


def test_the_way_back_is_the_other_way_round() -> None:
    """Who serves is never older than who is served: agents and controllers go back last."""
    assert upgrade.order("0.1.0", "0.2.0") == upgrade.order("0.1.0", "0.1.0") == upgrade.order("dev", "0.1.0")
    assert upgrade.order("0.1.0", "0.2.0")[0] == (parts.CONTROLPLANE,)
    assert upgrade.order("0.2.1", "0.1.4") == upgrade.order("0.1.0", "0.2.0")[::-1]


def test_many_nodes_may_take_longer_than_the_time_for_one(api_server: ControlPlane, cluster: Cluster) -> None:
    built = manifests.build(load(), cluster.namespace)
    api_server.apply(
        next(o for o in built if o["metadata"]["name"] == parts.AGENT and o["kind"] == "DaemonSet")
    )
    nodes, timeout = 4, 4.0

    def controller() -> None:
        for updated in range(nodes + 1):
            tell(cluster, wanted=nodes, updated=updated)
            time.sleep(timeout * 0.4)

    tell(cluster, wanted=nodes, updated=0)
    thread = threading.Thread(target=controller)
    began = time.monotonic()
    thread.start()
    try:
        upgrade.wait(cluster, (parts.AGENT,), timeout)
    finally:
        thread.join()
    assert time.monotonic() - began > timeout, "it did not take longer, so nothing was shown"

    tell(cluster, wanted=nodes, updated=1)
    with pytest.raises(upgrade.UpgradeError, match="4 of 4 are ready, 1 of the present version"):
        upgrade.wait(cluster, (parts.AGENT,), 1.0)


def tell(cluster: Cluster, *, wanted: int, updated: int) -> None:
    """The agents' status, as the DaemonSet controller writes it."""
    status: Json = {
        "observedGeneration": 1,
        "desiredNumberScheduled": wanted,
        "currentNumberScheduled": wanted,
        "numberMisscheduled": 0,
        "numberReady": wanted,
        "numberAvailable": wanted,
        "updatedNumberScheduled": updated,
    }
    cluster.patch(
        path_of("apps/v1", "daemonsets", cluster.namespace, parts.AGENT, "status"), {"status": status}
    )
