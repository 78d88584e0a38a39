"""Verdicts on policy objects, and the shape that each kind's status has for them. The whole way is in test_on_kubernetes.py."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from controlplane.clients import Clients
from controlplane.credentials import Caller
from controlplane.model.findings import Finding, Severity
from controlplane.source import Key, Object
from controlplane.status.board import Board, Holding, Outcome, Replica, Verdict
from controlplane.status.conditions import conditions_of, said_programmed, status_of
from controlplane.status.programming import Programming
from controlplane.status.replicas import holding

NOW = "2026-06-01T12:00:00Z"
AGENT, OTHER = ("node-1", "agent"), ("node-2", "agent")


def policy(
    name: str = "a", generation: int = 1, kind: str = "security.istio.io/AuthorizationPolicy", **spec: Any
) -> Object:
    group, _, kind = kind.partition("/")
    metadata = {"name": name, "namespace": "default", "uid": f"uid-{name}", "generation": generation}
    manifest = {"apiVersion": f"{group}/v1", "kind": kind, "metadata": metadata, "spec": spec}
    return Object(Key(group, kind, "default", name), manifest)


class Controller:
    """The tracker and the board of one controller."""

    def __init__(self) -> None:
        self.programming = Programming()
        self.board = Board(self.programming)
        self.refused: dict[Key, Object] = {}
        self.findings: list[Finding] = []

    def publish(self, version: str, *objects: Object) -> None:
        self.programming.published(version, {o.key: o for o in objects})

    def holding(self, **acked: str) -> Holding:
        """``node_1="v1"``: the version that an agent acknowledged."""
        clients = {(n.replace("_", "-"), "agent"): self.programming.sequence_of(v) for n, v in acked.items()}
        return Holding(clients, {})

    def replica(self, name: str, **acked: str) -> Replica:
        own = self.holding(**acked)
        contents = {i: (c.digest, c.since) for i, c in self.programming.by_id.items()}
        return Replica(name, own.clients, contents, own.refusals)

    def judge(
        self, own: Holding, *replicas: Replica, expected: tuple[tuple[str, str], ...] = ()
    ) -> dict[str, Verdict]:
        self.board.judge(self.findings, self.refused, own, expected, replicas)
        return {k.name: v for k, v in self.board.verdicts.items()}


def test_programmed_when_all_have_acknowledged_a_snapshot_with_it() -> None:
    c = Controller()
    c.publish("v1")
    c.publish("v2", policy())
    verdict = c.judge(c.holding(node_1="v1", node_2="v2"))["a"]
    assert (verdict.outcome, verdict.waiting) == (Outcome.ACCEPTED, "node-1 agent")
    # A later snapshot holds it too; one that nobody knows holds nothing.
    c.publish("v3", policy())
    assert c.judge(c.holding(node_1="unknown", node_2="v3"))["a"].outcome is Outcome.ACCEPTED
    assert c.judge(c.holding(node_1="v3", node_2="v2"))["a"].outcome is Outcome.PROGRAMMED


def test_an_object_that_changes_nothing_is_programmed_by_the_snapshot_that_is_there() -> None:
    c = Controller()
    c.publish("v1")
    c.publish("v1", policy())
    assert c.judge(c.holding(node_1="v1"))["a"].outcome is Outcome.PROGRAMMED


def test_back_to_an_older_snapshot() -> None:
    """v1 is published, then v2, then v1 again with the object's new version: who has v2 has not got that."""
    c = Controller()
    c.publish("v1", policy())
    c.publish("v2", policy(generation=2, action="DENY"))
    c.publish("v1", policy(generation=3))
    assert c.judge(c.holding(node_1="v2"))["a"].outcome is Outcome.ACCEPTED
    assert c.judge(c.holding(node_1="v1"))["a"].outcome is Outcome.PROGRAMMED


def test_an_acknowledgement_of_before_is_none_for_what_came_back() -> None:
    """A policy is changed and changed back while a client is busy with the change: it has that in force, or nobody knows."""
    c = Controller()
    clients = Clients(CollectorRegistry())
    with clients.connected(Caller("node-1"), "agent", "peer") as client:

        def outcome() -> Outcome:
            return c.judge(holding(clients, c.programming))["a"].outcome

        c.publish("v1", policy())
        client.sent("v1")
        assert outcome() is Outcome.ACCEPTED
        client.answered("v1")
        assert outcome() is Outcome.PROGRAMMED
        c.publish("v2", policy(generation=2, action="DENY"))
        client.sent("v2")
        c.publish("v1", policy(generation=3))
        assert outcome() is Outcome.ACCEPTED
        client.sent("v1")  # xDS: of another type, while the first is on its way
        assert outcome() is Outcome.ACCEPTED
        client.answered("v1")
        assert outcome() is Outcome.PROGRAMMED


def test_programmed_stays_until_the_content_changes() -> None:
    c = Controller()
    c.publish("v1", policy())
    assert c.judge(c.holding(node_1="v1"))["a"].outcome is Outcome.PROGRAMMED
    assert c.judge(c.holding(node_1="v1", node_2=""))["a"].outcome is Outcome.PROGRAMMED, "a node joins"
    c.publish("v2", policy(generation=2, action="DENY"))
    assert c.judge(c.holding(node_1="v1", node_2="v2"))["a"].outcome is Outcome.ACCEPTED
    c.publish("v3")
    c.judge(c.holding(node_1="v3"))
    c.publish("v4", policy())
    assert c.judge(c.holding(node_1="v3"))["a"].outcome is Outcome.ACCEPTED, "it was away meanwhile"


def test_who_should_be_there_is_waited_for() -> None:
    c = Controller()
    c.publish("v1", policy())
    verdict = c.judge(c.holding(node_1="v1"), expected=(AGENT, OTHER))["a"]
    assert (verdict.outcome, verdict.waiting) == (Outcome.ACCEPTED, "node-2 agent (not connected)")
    assert (
        c.judge(c.holding(node_1="v1", node_2="v1"), expected=(AGENT, OTHER))["a"].outcome
        is Outcome.PROGRAMMED
    )


def test_who_refuses_a_part_has_not_got_the_whole() -> None:
    c = Controller()
    c.publish("v1", policy())
    own = Holding({AGENT: 0}, {AGENT: "service/default/web: table full"})
    verdict = c.judge(own)["a"]
    assert verdict.outcome is Outcome.ACCEPTED
    assert verdict.waiting == "node-1 agent (refuses service/default/web: table full)"


def test_clients_of_the_other_controller_count() -> None:
    """Its counts and its snapshots are its own: what it has in force is told by the object's content."""
    c, other = Controller(), Controller()
    c.publish("v1")
    c.publish("v2", policy())
    for n in range(5):
        other.publish(f"w{n}")
    assert "node-2 agent" in c.judge(c.holding(node_1="v2"), other.replica("b", node_2="w4"))["a"].waiting
    other.publish("w5", policy(action="DENY"))
    assert c.judge(c.holding(node_1="v2"), other.replica("b", node_2="w5"))["a"].outcome is Outcome.ACCEPTED
    other.publish("w6", policy())
    assert c.judge(c.holding(node_1="v2"), other.replica("b", node_2="w5"))["a"].outcome is Outcome.ACCEPTED
    assert c.judge(c.holding(node_1="v2"), other.replica("b", node_2="w6"))["a"].outcome is Outcome.PROGRAMMED
    assert c.judge(c.holding(node_1="v2"), other.replica("b"))["a"].outcome is Outcome.PROGRAMMED


def test_many_that_are_late_are_counted() -> None:
    c = Controller()
    c.publish("v1", policy())
    waiting = c.judge(c.holding(**{f"node_{n}": "" for n in range(200)}))["a"].waiting
    assert waiting.endswith(" and 195 more")


def test_refused_and_what_is_in_force_meanwhile() -> None:
    c = Controller()
    c.publish("v1", policy())
    wrong = policy(generation=2, action="WRONG")
    c.refused = {wrong.key: wrong, policy("new").key: policy("new")}
    c.findings = [Finding(Severity.ERROR, "", "spec.action", "no action", "correct it", "", wrong.key)]
    verdicts = c.judge(c.holding(node_1="v1"))
    assert verdicts["a"].outcome is Outcome.REFUSED
    assert verdicts["a"].generation == 2
    assert (
        verdicts["a"].message == "spec.action: no action (correct it) (the last good version stays in force)"
    )
    assert conditions_of(verdicts["a"])["Programmed"][2] == "the last good version is in force"
    assert conditions_of(verdicts["new"])["Programmed"][2] == "nothing of it is in force"
    # Of another kind by the same name nothing is said.
    twin = policy(kind="policy.linkerd.io/AuthorizationPolicy")
    c.publish("v2", policy(), twin)
    c.refused = {}
    c.judge(c.holding(node_1="v2"))
    assert {k.group: v.outcome for k, v in c.board.verdicts.items()} == {
        "security.istio.io": Outcome.REFUSED,
        "policy.linkerd.io": Outcome.NOT_COMPILED,
    }


def test_warnings_are_told_with_acceptance() -> None:
    c = Controller()
    c.publish("v1", policy())
    c.findings = [Finding(Severity.WARNING, "", "spec.x", "not in force yet", "", "", policy().key)]
    verdict = c.judge(c.holding(node_1="v1"))["a"]
    assert conditions_of(verdict)["Accepted"] == ("True", "PartlyInForce", "spec.x: not in force yet")


def test_pods_and_services_get_no_verdict() -> None:
    c = Controller()
    pod = Object(Key("", "Pod", "default", "p"), {"apiVersion": "v1", "metadata": {"name": "p", "uid": "u"}})
    c.publish("v1", pod)
    assert c.judge(c.holding()) == {}


def verdict(
    outcome: Outcome = Outcome.PROGRAMMED, kind: str = "security.istio.io/AuthorizationPolicy", **fields: Any
) -> Verdict:
    group, _, name = kind.partition("/")
    values: dict[str, Any] = {"reason": "Accepted", "message": "", **fields}
    return Verdict(Key(group, name, "default", "a"), f"{group}/v1", "uid-a", 1, "d", outcome, **values)


def apply(manifest: dict[str, Any], of: Verdict, now: str = NOW, own: bool = True) -> dict[str, Any] | None:
    """What would be written, also put into the manifest as the API server does."""
    changes = status_of(manifest, of, now, lambda ref, _: ref.get("kind") == "Service", lambda _: own)
    if changes is not None:
        manifest["status"] = {**(manifest.get("status") or {}), **changes}
    return changes


def test_istio_status() -> None:
    manifest: dict[str, Any] = {"metadata": {"generation": 1}, "status": {"validationMessages": ["theirs"]}}
    waiting = verdict(Outcome.ACCEPTED, waiting="node-1 agent")
    assert apply(manifest, waiting) == {
        "conditions": [
            {
                "type": "Accepted",
                "status": "True",
                "reason": "Accepted",
                "message": "",
                "lastTransitionTime": NOW,
                "observedGeneration": 1,
            },
            {
                "type": "Programmed",
                "status": "False",
                "reason": "Pending",
                "message": "waiting for node-1 agent",
                "lastTransitionTime": NOW,
                "observedGeneration": 1,
            },
        ],
        "observedGeneration": 1,
    }
    assert not said_programmed(manifest)
    assert apply(manifest, waiting, "2026-06-01T13:00:00Z") is None, "time alone is no change"
    later = apply(manifest, verdict(), "2026-06-01T13:00:00Z")
    assert later is not None
    assert [c["lastTransitionTime"] for c in later["conditions"]] == [NOW, "2026-06-01T13:00:00Z"]
    assert "observedGeneration" not in later
    assert said_programmed(manifest)
    manifest["metadata"]["generation"] = 2
    assert not said_programmed(manifest)
    assert manifest["status"]["validationMessages"] == ["theirs"]
    manifest["status"]["observedGeneration"] = "2"
    assert "observedGeneration" not in (apply(manifest, verdict()) or {}), "protobuf writes numbers as text"


ROUTE = "gateway.networking.k8s.io/HTTPRoute"


def test_a_route_has_an_entry_for_each_parent_of_ours() -> None:
    theirs = {
        "parentRef": {"name": "gw"},
        "controllerName": "example.com/other",
        "conditions": [{"type": "Accepted"}],
    }
    web = {"group": "", "kind": "Service", "name": "web"}
    api = {"group": "", "kind": "Service", "name": "api"}
    manifest: dict[str, Any] = {
        "metadata": {"generation": 1, "namespace": "default"},
        "spec": {"parentRefs": [web, {"name": "gw"}, api]},
        "status": {"parents": [theirs]},
    }
    not_compiled = verdict(Outcome.NOT_COMPILED, ROUTE, reason="NotCompiled")
    changes = apply(manifest, not_compiled)
    assert changes is not None
    assert changes["parents"][0] == theirs
    assert [p["parentRef"] for p in changes["parents"][1:]] == [web, api]
    said = {c["type"]: c["status"] for c in changes["parents"][1]["conditions"]}
    assert said == {"Accepted": "False", "Programmed": "False", "ResolvedRefs": "Unknown"}
    assert apply(manifest, not_compiled) is None
    # Another's entry comes between; ours keep their places, and one goes with its parentRef.
    parents = manifest["status"]["parents"]
    parents.insert(2, {"parentRef": {"name": "x"}, "controllerName": "example.com/x"})
    assert apply(manifest, not_compiled) is None
    manifest["spec"]["parentRefs"] = [api]
    assert apply(manifest, not_compiled) is not None
    assert [(p["controllerName"], p["parentRef"].get("name")) for p in manifest["status"]["parents"]] == [
        ("example.com/other", "gw"),
        ("mycel.io/controller", "api"),
        ("example.com/x", "x"),
    ]
    assert apply(manifest, verdict(Outcome.PROGRAMMED, ROUTE)) is not None
    assert said_programmed(manifest)


@pytest.mark.parametrize("kind", ["GatewayClass", "Gateway"])
def test_gateways_of_others_are_left_alone(kind: str) -> None:
    manifest: dict[str, Any] = {
        "metadata": {"generation": 1},
        "status": {"conditions": [{"type": "Accepted"}]},
    }
    of = verdict(Outcome.NOT_COMPILED, f"gateway.networking.k8s.io/{kind}", reason="NotCompiled")
    assert apply(manifest, of, own=False) is None
    changes = apply(manifest, of)
    assert changes is not None
    assert {c["type"] for c in changes["conditions"]} == (
        {"Accepted"} if kind == "GatewayClass" else {"Accepted", "Programmed"}
    )


def test_linkerds_rate_limits_say_their_target() -> None:
    target = {"group": "policy.linkerd.io", "kind": "Server", "name": "web"}
    manifest: dict[str, Any] = {"metadata": {"generation": 1}, "spec": {"targetRef": target}}
    changes = apply(manifest, verdict(Outcome.NOT_COMPILED, "policy.linkerd.io/HTTPLocalRateLimitPolicy"))
    assert changes is not None
    assert changes["targetRef"] == target
    assert "observedGeneration" not in changes
