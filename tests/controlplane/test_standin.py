"""A policy that is refused and never was in force: its absence would allow what it was written to forbid."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.api import Action, Authorization, MtlsMode, NetworkPolicy, Rule, authorize
from controlplane.compiler import compile_snapshot, validate
from controlplane.controller import Controller, folder_backing
from controlplane.model.snapshot import Snapshot
from controlplane.model.world import Settings
from controlplane.source import State
from controlplane.source.objects import Object, key_of
from controlplane.standin import in_force, stand_in
from tests.controlplane.support import (
    Harness,
    Manifest,
    eventually,
    istio,
    mesh_namespace,
    objects,
    pod,
    write,
)

PODS = [mesh_namespace(), pod("a", "10.1.0.1", app="a"), pod("b", "10.1.0.2", app="b")]
SELECTOR = {"selector": {"matchLabels": {"app": "a"}}}
BAD_RULES = [{"to": [{"operation": {"ports": ["many"]}}]}]
EVERYTHING = (Rule(),)


def refused(manifest: Manifest) -> Object:
    assert list(validate(manifest)), "it has to be wrong"
    return Object(key_of(manifest), manifest, "file.yaml")


def snapshot_with(manifest: Manifest, *others: Manifest) -> Snapshot:
    wrong = refused(manifest)
    found, faults = in_force(State(objects(*PODS, *others), refused={wrong.key: wrong}))
    assert bool(faults) is (wrong.key in found)
    return compile_snapshot(found, Settings())


def policy(spec: Any, ns: str = "default", **metadata: Any) -> Manifest:
    return istio("AuthorizationPolicy", "x", spec, ns, **metadata)


def network(spec: Any) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "x", "namespace": "default"},
        "spec": spec,
    }


@pytest.mark.parametrize(
    ("spec", "action", "rules", "selected"),
    [
        ({"action": "DENY", "rules": BAD_RULES, **SELECTOR}, Action.DENY, EVERYTHING, "a"),
        ({"action": "DENY", "rules": BAD_RULES}, Action.DENY, EVERYTHING, "ab"),
        # an ALLOW allows nothing, and takes nothing from others
        ({"rules": BAD_RULES, **SELECTOR}, Action.ALLOW, (), "a"),
        ({"action": "ALLOW", "rules": "x"}, Action.ALLOW, (), "ab"),
        ({"action": "CUSTOM", "rules": [{}], **SELECTOR}, Action.DENY, EVERYTHING, "a"),
        # what is misspelt may be anything
        ({"action": "Deny", "rules": [{}], **SELECTOR}, Action.DENY, EVERYTHING, "a"),
        ({"action": "DENY", "selectr": {"matchLabels": {"app": "a"}}}, Action.DENY, EVERYTHING, "ab"),
        ({"action": "DENY", "selector": {"matchLabel": {"app": "a"}}}, Action.DENY, EVERYTHING, "ab"),
        ({"action": "DENY", "selector": {"matchLabels": {"app": "*"}}}, Action.DENY, EVERYTHING, "ab"),
        ("no spec", Action.ALLOW, (), "ab"),
        (["no spec"], Action.ALLOW, (), "ab"),
    ],
)
def test_an_authorization_policy(spec: Any, action: Action, rules: tuple[Rule, ...], selected: str) -> None:
    snapshot = snapshot_with(policy(spec))
    assert snapshot.resources["authorization/default/x"] == Authorization("default", "x", action, rules)
    assert "".join(w.name for w in snapshot.workloads.values() if w.policies) == selected


def test_in_an_unknown_version_it_is_the_same() -> None:
    wrong = {**policy({"action": "DENY", "rules": [{}], **SELECTOR}), "apiVersion": "security.istio.io/v9"}
    snapshot = snapshot_with(wrong)
    assert [w.name for w in snapshot.workloads.values() if w.policies] == ["a"]


def test_other_policies_still_count() -> None:
    allow = istio("AuthorizationPolicy", "good", {"rules": [{"to": [{"operation": {"ports": ["80"]}}]}]})
    for action, allowed in (("ALLOW", True), ("DENY", False)):
        snapshot = snapshot_with(policy({"action": action, "rules": BAD_RULES}), allow)
        found = [snapshot.resources[f"authorization/default/{n}"] for n in ("good", "x")]
        policies = [p for p in found if isinstance(p, Authorization)]
        assert authorize(policies, None, 80).allowed is allowed
        assert not authorize(policies, None, 81).allowed


@pytest.mark.parametrize(
    "manifest",
    [
        policy({"action": "AUDIT", "rules": BAD_RULES}),
        policy({"action": "DENY", "rules": BAD_RULES}, annotations={"istio.io/dry-run": "true"}),
        istio("PeerAuthentication", "x", {"mtls": {"mode": "PERMISSIVE"}, "selectr": {}}),
        istio("VirtualService", "x", {}),
    ],
)
def test_what_was_not_meant_to_refuse_does_not(manifest: Manifest) -> None:
    wrong = refused(manifest)
    assert stand_in(wrong) is None
    snapshot = snapshot_with(manifest)
    assert not any(w.policies for w in snapshot.workloads.values())


@pytest.mark.parametrize(
    ("spec", "strict"),
    [
        ({"mtls": {"mode": "STRICT"}, "portLevelMtls": {"80": {"mode": "STRICT"}}}, "ab"),
        ({**SELECTOR, "mtls": {"mode": "STRICT"}, "portLevelMtls": {"x": {"mode": "STRICT"}}}, "a"),
        ({**SELECTOR, "mtls": {"mode": "strict"}}, "a"),
        ({**SELECTOR, "mtls": {"mode": "UNSET"}, "portLevelMtls": {"x": {"mode": "STRICT"}}}, "a"),
    ],
)
def test_a_peer_authentication(spec: Manifest, strict: str) -> None:
    snapshot = snapshot_with(istio("PeerAuthentication", "x", spec))
    found = "".join(w.name for w in snapshot.workloads.values() if w.mtls is MtlsMode.STRICT)
    assert found == strict


@pytest.mark.parametrize(
    ("spec", "ingress", "egress", "selected"),
    [
        ({"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"from": [{}]}]}, (), None, "a"),
        ({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": [{}]}]}, None, (), "ab"),
        ({"egress": [{"to": [{}]}]}, (), (), "ab"),
        ({"podSelector": {"matchLabels": {"a,b": "c"}}}, (), None, "ab"),
        ({"podSelector": {"matchLabels": {"app": "a"}}, "policyTypes": ["ingress"]}, (), (), "a"),
        ({"podSelector": {"matchLabels": {"app": "a"}}, "policyTipes": ["Egress"]}, (), (), "ab"),
    ],
)
def test_a_network_policy(spec: Manifest, ingress: Any, egress: Any, selected: str) -> None:
    snapshot = snapshot_with(network(spec))
    assert snapshot.resources["network/default/x"] == NetworkPolicy("default", "x", ingress, egress)
    assert "".join(w.name for w in snapshot.workloads.values() if w.network_policies) == selected


def test_where_a_good_version_is_there_nothing_stands_in() -> None:
    wrong = refused(policy({"action": "DENY", "rules": BAD_RULES}))
    good = objects(policy({"rules": [{}]}))
    state = State(good, refused={wrong.key: wrong})
    assert in_force(state) == (good, ())


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ("selector", "matchLabels", "action", "targetRefs", "podSelector", "mtls", "mode", "app")
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
_KINDS = ("AuthorizationPolicy", "PeerAuthentication", "NetworkPolicy")


@given(
    _JSON, st.sampled_from(_KINDS), st.dictionaries(st.sampled_from(("uid", "annotations", "labels")), _JSON)
)
def test_whatever_is_written_there_is_a_stand_in_that_compiles(
    spec: Any, kind: str, metadata: Manifest
) -> None:
    made = network(spec) if kind == "NetworkPolicy" else istio(kind, "x", spec)
    made["metadata"] |= metadata
    found = stand_in(Object(key_of(made), made))
    if found is None:
        return
    assert not list(validate(dict(found.manifest))), found.manifest
    compile_snapshot({**objects(*PODS), found.key: found}, Settings())


async def test_a_controller_that_starts_with_nothing_but_a_bad_policy_refuses(harness: Harness) -> None:
    """As after an upgrade to a version that judges more strictly, on a machine without the last good state."""
    write(harness.config, "pods.yaml", *PODS)
    bad = policy({"action": "DENY", "rules": BAD_RULES, **SELECTOR})
    write(harness.config, "policy.yaml", bad)

    def policies(controller: Controller) -> dict[str, tuple[str, ...]]:
        return {w.name: w.policies for w in controller.snapshot.workloads.values()}

    async with harness.serving() as controller:
        assert policies(controller) == {"a": ("default/x",), "b": ()}
        found = [str(f) for f in controller.findings if f.object.endswith("default/x")]
        assert any(
            "no version of it was ever good: everything is refused where it may apply" in f for f in found
        )
        key = key_of(bad)

        async def judged() -> bool:
            return key in controller.status.verdicts

        await eventually(judged)
        verdict = controller.status.verdicts[key]
        assert (verdict.outcome.value, verdict.in_force) == ("refused", False)
        assert "(the last good version stays in force)" not in verdict.message
    # It is no last good version of anything: what is right comes into force.
    good = policy({"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["80"]}}]}], **SELECTOR})
    write(harness.config, "policy.yaml", good)
    async with harness.serving() as controller:
        resource = controller.snapshot.resources["authorization/default/x"]
        assert isinstance(resource, Authorization)
        assert resource.rules != EVERYTHING
        assert not controller.findings
    write(harness.config, "policy.yaml", bad)
    async with harness.serving() as controller:
        assert controller.snapshot.resources["authorization/default/x"] == resource, "the last good version"


class _Given:
    """A source of one state, whatever is in it."""

    def __init__(self, state: State) -> None:
        self._state = state

    def load(self) -> State:
        return self._state

    async def changes(self) -> AsyncIterator[State]:
        await asyncio.get_running_loop().create_future()
        yield self._state


def test_what_the_compiler_cannot_take_refuses_too(harness: Harness) -> None:
    """A bug of ours in a policy that never compiled: the same as one that its schema refuses."""
    broken = policy({"action": "DENY", "rules": [{"from": 7}], **SELECTOR})
    wrong = Object(key_of(broken), broken)
    given = _Given(State({**objects(*PODS), wrong.key: wrong}))
    backing = folder_backing(harness.config, harness.credentials, harness.state)
    controller = Controller(harness.options(), replace(backing, source=given))
    assert {w.name: w.policies for w in controller.snapshot.workloads.values()} == {
        "a": ("default/x",),
        "b": (),
    }
    found = controller.snapshot.resources["authorization/default/x"]
    assert found == Authorization("default", "x", Action.DENY, EVERYTHING)
    text = " ".join(str(f) for f in controller.findings)
    assert "the controller cannot compile it" in text
    assert "no version of it was ever good" in text
