"""Pods come and go: the workload is its UID, an address is nobody's, and nothing of ours stays behind."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from lab import CniError, Lab, Place, Pod, Traffic
from lab.node import hold
from lab.processes import wait_until
from tests.mesh.helpers import ECHO, authorization_policy, echo_server, echoes, greeting, rule

pytestmark = pytest.mark.privileged

NAMESPACE = "pods"


@pytest.fixture(scope="module", autouse=True)
def world(lab: Lab) -> None:
    lab.namespace(NAMESPACE)


@pytest.fixture(scope="module")
def server(lab: Lab, world: None) -> Iterator[Pod]:
    server = echo_server(lab, "server", node="node1", namespace=NAMESPACE)
    with lab.applied(
        authorization_policy(
            "server", NAMESPACE, selector={"app": "server"}, rules=[rule(principals=[f"{NAMESPACE}/trusted"])]
        )
    ):
        yield server


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_an_address_given_to_another_account_under_traffic_has_its_own_name_only(
    lab: Lab, server: Pod, node: str
):
    """Both clients dial without a pause, from the moment that their sandbox stands to the moment that it goes."""
    address = ""
    for turn in range(4):
        account = "trusted" if turn % 2 == 0 else "other"
        pod = lab.pod(
            f"{account}-{node}-{turn}",
            node=node,
            namespace=NAMESPACE,
            service_account=account,
            address=address,
        )
        assert address in ("", pod.address)
        address = pod.address
        traffic = Traffic.echo(pod, server.address, ECHO, timeout=1.5, interval=0.005)
        time.sleep(1.5)
        # The sandbox goes while the client is at it.
        pod.set_ready(False)
        records = traffic.end()
        pod.delete()
        good = [record for record in records if record["outcome"] == "ok"]
        assert records
        if account == "trusted":
            assert len(good) == len(records), records[:3]
            assert {record["greeting"]["peer"][0] for record in good} == {address}
        else:
            assert good == []
            assert not [record for record in records if "greeting" in record]


def test_an_address_given_to_a_server_of_another_account(lab: Lab):
    """A client that may reach the first server and not the second: the second has the first's address."""
    client = lab.pod("reuse-client", node="node1", namespace=NAMESPACE, service_account="client")
    far = lab.pod("reuse-far-client", node="node2", namespace=NAMESPACE, service_account="client")
    known = lab.pod("reuse-known", node="node1", namespace=NAMESPACE, service_account="known")
    policy = authorization_policy(
        "guarded", NAMESPACE, selector={"app": "guarded"}, rules=[rule(principals=[f"{NAMESPACE}/known"])]
    )
    with lab.applied(policy):
        first = echo_server(lab, "open", node="node1", namespace=NAMESPACE, service_account="open")
        lab.settle()
        assert echoes(client, first.address, ECHO) == ""
        assert echoes(far, first.address, ECHO) == ""
        first.delete()
        second = echo_server(lab, "guarded", node="node1", namespace=NAMESPACE, address=first.address)
        assert second.address == first.address
        assert echoes(client, second.address, ECHO, timeout=2) != ""
        assert echoes(far, second.address, ECHO, timeout=3) != ""
        assert echoes(known, second.address, ECHO) == ""
        second.delete()
        third = echo_server(lab, "open-again", node="node1", namespace=NAMESPACE, address=first.address)
        lab.settle()
        assert echoes(client, third.address, ECHO) == ""
        assert echoes(far, third.address, ECHO) == ""
        third.delete()
    for pod in (client, far, known):
        pod.delete()


@contextlib.contextmanager
def witness(lab: Lab, pod: Pod) -> Iterator[Place]:
    """A place with one end of a veth pair whose other end is in the pod: it goes when the pod's namespace is freed."""
    name = f"witness-{pod.record.uid[:4]}"
    place, holder = hold(name, lab.cgroup / name)
    try:
        pod.run(
            [
                "ip",
                "link",
                "add",
                "canary",
                "type",
                "veth",
                "peer",
                "name",
                "canary",
                "netns",
                str(holder.pid),
            ]
        )
        assert "canary" in place.run(["ip", "-o", "link"]).stdout
        yield place
    finally:
        holder.kill()
        holder.wait()


def lacks(place: Place, interface: str) -> bool:
    return interface not in place.run(["ip", "-o", "link"]).stdout


def test_after_del_nothing_of_ours_keeps_the_namespace_alive(lab: Lab, server: Pod):
    for node in ("node1", "node2"):
        pod = echo_server(lab, f"leaving-{node}", node=node, namespace=NAMESPACE, service_account="trusted")
        # It has used all that it can: listeners, HBONE both ways, deliveries, spare sockets.
        assert echoes(pod, server.address, ECHO) == ""
        for client_node in ("node1", "node2"):
            client = lab.pod(f"visitor-{client_node}", node=client_node, namespace=NAMESPACE)
            lab.settle()
            assert echoes(client, pod.address, ECHO) == ""
            client.delete()
        with witness(lab, pod) as place:
            pod.delete()
            wait_until(partial(lacks, place, "canary"), 5, f"the namespace of {pod.name} is freed")


def test_processes_hold_no_descriptors_of_pods_that_are_gone(lab: Lab):
    def descriptors() -> dict[str, int]:
        return {
            process.name: len(os.listdir(Path(f"/proc/{process.pid}/fd")))
            for process in lab.all_processes()
            if process.name.startswith("node")
        }

    lab.pod("warm-up", node="node1", namespace=NAMESPACE).delete()
    time.sleep(0.5)
    before = descriptors()
    for number in range(8):
        lab.pod(f"passing-{number}", node="node1", namespace=NAMESPACE).delete()
    deadline = time.monotonic() + 5
    while descriptors() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    after = descriptors()
    assert {name: after[name] - count for name, count in before.items() if after[name] > count + 2} == {}


def test_add_names_what_is_wrong(lab: Lab):
    """A pod that the cluster gave to another node."""
    node = lab.node("node1")
    pod = lab.pod("elsewhere", node="node2", namespace=NAMESPACE)
    container = "impostor"
    path = f"/run/netns/{container}"
    node.add_netns(container)
    try:
        args = {
            "IgnoreUnknown": "1",
            "K8S_POD_NAMESPACE": NAMESPACE,
            "K8S_POD_NAME": "elsewhere",
            "K8S_POD_UID": pod.uid,
        }
        with pytest.raises(CniError, match="belongs to node 'node2'") as error:
            node.runtime.add(container, path, args)
        assert error.value.code >= 100
        with pytest.raises(CniError, match="UID"):
            node.runtime.add(container, path, {"IgnoreUnknown": "1"})
    finally:
        node.remove_netns(container)
        pod.delete()


def test_check_finds_an_enrolled_pod_in_order(lab: Lab):
    pod = lab.pod("checked", node="node1", namespace=NAMESPACE)
    pod.check()
    pod.delete()
    with pytest.raises(Exception, match="never added"):
        pod.check()


def test_add_is_quick(lab: Lab):
    seconds = []
    for number in range(10):
        pod = lab.pod(f"quick-{number}", node="node1", namespace=NAMESPACE)
        seconds.append(pod.add_seconds)
        pod.delete()
    assert sorted(seconds)[5] < 1.0, seconds


def test_new_pod_is_enforced_from_its_first_packet(lab: Lab):
    """ADD returns when the kernel is programmed: a denied client never gets through, however early it is."""
    with lab.applied(authorization_policy("none", NAMESPACE, selector={"app": "early"}, rules=[])):
        client = lab.pod("early-client", node="node1", namespace=NAMESPACE)
        for _ in range(3):
            pod = lab.pod("early", node="node1", namespace=NAMESPACE)
            traffic = Traffic.echo(client, pod.address, ECHO, timeout=0.3, interval=0, count=4)
            pod.serve(pod.app("tcp_server", ECHO, "--greet"), ECHO)
            assert not [record for record in traffic.wait(20) if record["outcome"] == "ok"]
            pod.delete()
        client.delete()


def test_greeting_helper_sees_true_addresses_of_a_trusted_client(lab: Lab, server: Pod):
    pod = lab.pod("trusted-now", node="node2", namespace=NAMESPACE, service_account="trusted")
    assert greeting(pod, server.address, ECHO)["peer"][0] == pod.address
    pod.delete()
