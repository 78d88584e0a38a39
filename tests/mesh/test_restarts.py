"""The agent ends again and again, and comes back, also with other programs: whoever talks, or is denied, does not notice.

The long form is 100 restarts (half of them by kill -9) and 20 upgrades.
"""

from __future__ import annotations

import pytest

from bpf import wire
from lab import Lab, Talker, Traffic
from tests.mesh.helpers import (
    ECHO,
    authorization_policy,
    echo_server,
    echoes,
    eventually,
    principal,
    rule,
)
from tests.requirements import SOAK

pytestmark = [pytest.mark.privileged, pytest.mark.soak, pytest.mark.timeout(1200 if SOAK else 120)]

NAMESPACE = "restarts"
RESTARTS, UPGRADES = (100, 20) if SOAK else (3, 1)


def test_restarts_and_upgrades_under_allowed_and_denied_traffic(lab: Lab):
    """No wrong verdict, no connection broken, and every connection counted once."""
    lab.namespace(NAMESPACE)
    server = echo_server(lab, "server", node="node1", namespace=NAMESPACE)
    good = lab.pod("good", node="node1", namespace=NAMESPACE, service_account="good")
    bad = lab.pod("bad", node="node1", namespace=NAMESPACE, service_account="bad")
    far = lab.pod("far", node="node2", namespace=NAMESPACE, service_account="bad")
    policy = lab.apply(
        authorization_policy(
            "clients", NAMESPACE, selector={"app": "server"}, rules=[rule(principals=[f"{NAMESPACE}/good"])]
        )
    )
    lab.settle()
    labels = {
        "reporter": "destination",
        "source_principal": "spiffe://" + principal(NAMESPACE, "good"),
        "destination_workload": "server",
    }

    seal = f"/sys/fs/bpf/mycel/v{wire.ABI}/seal"

    def opened() -> float:
        return lab.metrics("node1", "agent").total("istio_tcp_connections_opened_total", **labels)

    assert echoes(good, server.address, ECHO) == ""
    eventually(lambda: opened() >= 1)
    before = opened()
    allowed = Traffic.echo(good, server.address, ECHO)
    denied = [Traffic.echo(pod, server.address, ECHO, timeout=0.5) for pod in (bad, far)]
    with Talker(good) as talker:
        assert talker.open(server.address, ECHO).ok
        assert talker("read")["text"]
        for turn in range(RESTARTS + UPGRADES):
            if turn % 2:
                lab.stop("node1", "agent")
            else:
                lab.kill("node1", "agent")
            if turn % ((RESTARTS + UPGRADES) // UPGRADES) == 0:
                # As another version: without it the loader replaces every program in its link, and then makes it again.
                lab.node("node1").run(["rm", seal])
            assert talker.exchange(times=2).ok
            lab.start("node1", "agent")
            lab.node("node1").run(["test", "-e", seal])
            assert talker.exchange(times=2).ok
    records = allowed.end(at_least=20)
    assert {record["outcome"] for record in records} == {"ok"}
    for traffic in denied:
        refused = traffic.end(at_least=3)
        assert "ok" not in {record["outcome"] for record in refused}
        assert not any("greeting" in record for record in refused)
    expected = before + len(records) + 1
    eventually(lambda: opened() == expected)
    assert opened() == expected
    lab.withdraw(policy)
    for pod in (good, bad, far, server):
        pod.delete()
