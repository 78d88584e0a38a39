"""Everything at once: pods come and go, policies change, processes are killed, and no verdict is ever wrong."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lab import Lab, Pod, Traffic
from tests.mesh.helpers import ECHO, HTTP, authorization_policy, echo_server, echoes, http_server, rule

pytestmark = pytest.mark.privileged

NAMESPACE = "faults"
#: Seconds of disorder.
DURATION = 20.0
#: After these processes die and come back, what passes through them may fail; seconds around it.
MARGIN = 1.0


class Disorder:
    """Does one random thing after the other. The same number gives the same order of things."""

    def __init__(self, lab: Lab, number: int) -> None:
        self._lab = lab
        self._random = random.Random(number)
        self._number = 0
        self._pods: list[Pod] = []
        #: When a proxy was away: (from, to).
        self.away: list[tuple[float, float]] = []
        self.done: Counter[str] = Counter()

    def go_on(self, seconds: float) -> None:
        things: list[tuple[Callable[[], None], int]] = [
            (self.pod_comes, 4),
            (self.pod_goes, 3),
            (self.policy_changes, 4),
            (self.service_changes, 3),
            (self.routes_change, 3),
            (self.agent_dies, 1),
            (self.proxy_dies, 1),
            (self.controller_dies, 1),
        ]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            (thing,) = self._random.choices([t for t, _ in things], [w for _, w in things])
            self._number += 1
            thing()
            self.done[thing.__name__] += 1
            time.sleep(self._random.random() * 0.2)
        # Nothing that kills may be left out by chance, nor may pods stay.
        for thing in (self.agent_dies, self.proxy_dies, self.controller_dies):
            thing()
        for pod in self._pods:
            pod.delete()

    def pod_comes(self) -> None:
        pod = self._lab.pod(
            f"passing-{self._number}",
            node=self._random.choice(["node1", "node2"]),
            namespace=NAMESPACE,
            service_account=self._random.choice(["good", "bad", "other"]),
        )
        pod.set_ready(True)
        self._pods.append(pod)

    def pod_goes(self) -> None:
        if self._pods:
            self._pods.pop(self._random.randrange(len(self._pods))).delete()

    def policy_changes(self) -> None:
        nobody = rule(principals=[f"{NAMESPACE}/nobody-{self._number}"], ports=[8000 + self._number])
        self._lab.apply(authorization_policy("noise", NAMESPACE, action="DENY", rules=[nobody]))

    def service_changes(self) -> None:
        self._lab.service(f"noise-{self._number % 5}", 1000 + self._number, namespace=NAMESPACE)

    def routes_change(self) -> None:
        self._lab.apply(routes(self._random.randrange(101)), name="faults-routes.yaml")

    def agent_dies(self) -> None:
        self._die(self._random.choice(["node1", "node2"]), "agent")

    def proxy_dies(self) -> None:
        started = time.time()
        self._die(self._random.choice(["node1", "node2"]), self._random.choice(["nodeproxy", "l7proxy"]))
        self.away.append((started, time.time()))

    def controller_dies(self) -> None:
        self._die("controlplane", "")

    def _die(self, node: str, component: str) -> None:
        if self._random.random() < 0.5:
            self._lab.kill(node, component)
        else:
            self._lab.stop(node, component)
        time.sleep(self._random.random() * 0.5)
        self._lab.start(node, component)

    def excuses(self, record: dict[str, Any]) -> bool:
        """Whether a proxy was away at some time of this connection or request."""
        begin, end = record["at"], record["at"] + record["seconds"]
        return any(since - MARGIN <= end and begin <= until + MARGIN for since, until in self.away)


def routes(weight: int) -> list[dict[str, Any]]:
    """``web`` with ``weight`` percent for v1."""
    destinations = [("v1", weight), ("v2", 100 - weight)]
    return [
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "DestinationRule",
            "metadata": {"name": "web", "namespace": NAMESPACE},
            "spec": {
                "host": "web",
                "subsets": [{"name": v, "labels": {"version": v}} for v, _ in destinations],
            },
        },
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "VirtualService",
            "metadata": {"name": "web", "namespace": NAMESPACE},
            "spec": {
                "hosts": ["web"],
                "http": [
                    {
                        "route": [
                            {"destination": {"host": "web", "subset": version}, "weight": share}
                            for version, share in destinations
                        ]
                    }
                ],
            },
        },
    ]


def outcome(record: dict[str, Any]) -> str:
    """What a client of either kind saw: ``ok`` or what else."""
    if "outcome" in record:
        return str(record["outcome"])
    return "ok" if record.get("status") == 200 else str(record.get("status") or record["error"])


@pytest.mark.timeout(180)
def test_no_verdict_is_wrong_whatever_happens(lab: Lab):
    lab.namespace(NAMESPACE)
    nodes = {"v1": "node1", "v2": "node2"}
    servers = []
    for version, node in nodes.items():
        labels = {"version": version}
        servers.append(
            echo_server(
                lab, f"echo-{version}", node=node, namespace=NAMESPACE, labels={"app": "echo", **labels}
            )
        )
        servers.append(
            http_server(
                lab,
                f"web-{version}",
                node=node,
                namespace=NAMESPACE,
                version=version,
                labels={"app": "web", **labels},
            )
        )
    echo = lab.service("echo", 80, target_port=ECHO, namespace=NAMESPACE, port_name="tcp")
    web = lab.service("web", 80, target_port=HTTP, namespace=NAMESPACE)
    for app in ("echo", "web"):
        allowed = rule(principals=[f"{NAMESPACE}/good"])
        lab.apply(authorization_policy(f"only-good-{app}", NAMESPACE, selector={"app": app}, rules=[allowed]))
    lab.apply(routes(50), name="faults-routes.yaml")
    clients = {
        (who, node): lab.pod(f"{who}-{node}", node=node, namespace=NAMESPACE, service_account=who)
        for who in ("good", "bad")
        for node in nodes.values()
    }
    lab.settle()
    traffic = {}
    for (who, node), pod in clients.items():
        timeout = 15.0 if who == "good" else 1.0
        traffic[who, node, "echo"] = Traffic.echo(pod, echo, 80, interval=0.01, timeout=timeout)
        options = ["--count", 10**6, "--per-connection", 7, "--interval", 0.01]
        traffic[who, node, "web"] = Traffic(pod, "http_client", f"http://{web}/", *options)

    disorder = Disorder(lab, 20)
    disorder.go_on(DURATION)
    lab.settle(timeout=30)
    time.sleep(MARGIN)
    calm = time.time()
    time.sleep(2)

    for (who, node, what), one in traffic.items():
        records = one.end()
        assert len(records) > 50, (who, node, what)
        if who == "bad":
            assert [record for record in records if outcome(record) == "ok"] == [], (node, what)
            continue
        odd = [r for r in records if outcome(r) != "ok" and not disorder.excuses(r)]
        assert odd == [], (node, what, disorder.done)
        # And all is well again in the end.
        last = [outcome(record) for record in records if record["at"] > calm]
        assert len(last) > 10
        assert set(last) == {"ok"}, (node, what)
    for path in lab.cluster.policies.iterdir():
        if NAMESPACE in path.name:
            path.unlink()
    for pod in (*clients.values(), *servers):
        pod.delete()
    lab.settle()


def test_many_pods_at_once(lab: Lab):
    """Twenty-four ADDs at one time, and each pod is who it is from its first connection."""
    lab.namespace(NAMESPACE)
    server = echo_server(lab, "many-server", node="node1", namespace=NAMESPACE)
    lab.apply(
        authorization_policy(
            "many", NAMESPACE, selector={"app": "many-server"}, rules=[rule(principals=[f"{NAMESPACE}/even"])]
        )
    )

    def make(number: int) -> Pod:
        account = "odd" if number % 2 else "even"
        node = "node1" if number % 4 < 2 else "node2"
        return lab.pod(f"many-{number}", node=node, namespace=NAMESPACE, service_account=account)

    with ThreadPoolExecutor(8) as pool:
        pods = list(pool.map(make, range(24)))
        lab.settle()
        passed = list(pool.map(lambda pod: echoes(pod, server.address, ECHO, timeout=8) == "", pods))
        assert passed == [number % 2 == 0 for number in range(24)]
        assert len({pod.address for pod in pods}) == 24
        list(pool.map(lambda pod: pod.delete(), pods))
    lab.withdraw(f"authorizationpolicy-{NAMESPACE}-many.yaml")
    server.delete()
    lab.settle()
