"""The API as the source: kinds that come and go, an API server that is away, lists read again, and what is refused."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common.kubernetes import Access, ApiError, Client, path_of
from controlplane.source import Key, State
from controlplane.source.lastgood import LastGood
from deploy import crds, rbac
from lab.kubernetes import ControlPlane
from tests.controlplane.support import istio
from tests.source.conftest import SOON, Relay, following, install_definitions

pytestmark = pytest.mark.privileged

DEFINITIONS = path_of("apiextensions.k8s.io/v1", "customresourcedefinitions")
VIRTUAL_SERVICES = path_of("networking.istio.io/v1", "virtualservices", "default")
RULES = path_of("networking.istio.io/v1", "destinationrules", "default")
ROUTE = {"route": [{"destination": {"host": "a"}}]}


def key(kind: str, name: str, group: str = "networking.istio.io") -> Key:
    return Key(group, kind, "default", name)


def rule(name: str, host: str = "a") -> dict[str, Any]:
    return istio("DestinationRule", name, {"host": host}) | {"apiVersion": "networking.istio.io/v1"}


def config_map(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "default"}}


@pytest.fixture
async def clean(mesh_server: ControlPlane) -> AsyncIterator[Client]:
    """A client as administrator; configuration that a test makes is removed."""
    async with Client(Access.load(mesh_server.kubeconfig)) as client:
        yield client
        for path in (VIRTUAL_SERVICES, RULES):
            await client.delete(path)


async def test_first_state_is_whole_and_trimmed(clean: Client) -> None:
    await clean.create(RULES, rule("first"))
    async with following(clean) as followed:
        assert not followed.source.ready
        assert not followed.state.objects
        state = await followed.until(lambda s: s.objects)
        assert followed.source.ready and followed.source.synced
        assert not state.faults
        assert key("DestinationRule", "first") in state.objects
        assert Key("", "Namespace", "", "kube-system") in state.objects
        metadata = state.objects[key("DestinationRule", "first")].manifest["metadata"]
        assert set(metadata) == {"name", "namespace", "uid", "generation", "creationTimestamp"}


async def test_changes_are_seen_and_status_is_no_change(clean: Client) -> None:
    async with following(clean) as followed:
        await followed.until(lambda s: s.objects)
        await clean.create(RULES, rule("one"))
        await followed.until(lambda s: key("DestinationRule", "one") in s.objects)
        await clean.patch(f"{RULES}/one", {"spec": {"host": "b"}})
        await followed.until(lambda s: s.objects[key("DestinationRule", "one")].spec["host"] == "b")
        count = len(followed.states)
        status = {"status": {"conditions": [{"type": "Reconciled", "status": "True"}]}}
        await clean.patch(f"{RULES}/one/status", status)
        await clean.create(RULES, rule("two"))
        await followed.until(lambda s: key("DestinationRule", "two") in s.objects)
        assert len(followed.states) == count + 1
        await clean.delete(f"{RULES}/one")
        await followed.until(lambda s: key("DestinationRule", "one") not in s.objects)


async def test_what_is_refused_keeps_its_last_good_version(clean: Client, tmp_path: Path) -> None:
    """The schema of the API server takes a regular expression that is none; ours does not."""
    good = {"hosts": ["a"], "http": [ROUTE]}
    bad = {"hosts": ["a"], "http": [{**ROUTE, "match": [{"uri": {"regex": "(?=a)"}}]}]}
    await clean.create(VIRTUAL_SERVICES, istio("VirtualService", "x", good))
    await clean.create(VIRTUAL_SERVICES, istio("VirtualService", "never", bad))
    store = LastGood(tmp_path / "last-good.json")
    async with following(clean, store) as followed:
        state = await followed.until(lambda s: s.objects)
        assert key("VirtualService", "never") not in state.objects
        assert [(f.object, f.field) for f in state.faults] == [
            ("VirtualService default/never", "spec.http[0].match[0].uri.regex")
        ]
        await clean.patch(f"{VIRTUAL_SERVICES}/x", {"spec": bad})
        state = await followed.until(lambda s: len(s.faults) == 2)
        assert state.objects[key("VirtualService", "x")].spec == good
    # Another process, that knows only what is on disk.
    async with following(clean, store) as followed:
        assert followed.source.ready
        assert followed.state.objects[key("VirtualService", "x")].spec == good
        state = await followed.until(lambda s: len(s.faults) == 2)
        assert state.objects[key("VirtualService", "x")].spec == good
        await clean.patch(f"{VIRTUAL_SERVICES}/x", {"spec": {"http": [ROUTE | {"timeout": "2s"}]}})
        state = await followed.until(lambda s: len(s.faults) == 1)
        assert state.objects[key("VirtualService", "x")].spec["http"][0]["timeout"] == "2s"


async def undefine(client: Client, name: str) -> None:
    """Remove a definition, and wait until it is gone: its objects go before it, and while it goes none can be made."""
    await client.delete(f"{DEFINITIONS}/{name}")
    async with asyncio.timeout(SOON):
        while True:
            try:
                await client.get(f"{DEFINITIONS}/{name}")
            except ApiError as e:
                if e.status != 404:
                    raise
                return
            await asyncio.sleep(0.05)


async def test_kinds_come_and_go(clean: Client) -> None:
    name = "telemetries.telemetry.istio.io"
    (definition,) = [d for d in crds.definitions(["istio"]) if d["metadata"]["name"] == name]
    telemetry = path_of("telemetry.istio.io/v1", "telemetries", "default")
    body = {"apiVersion": "telemetry.istio.io/v1", "kind": "Telemetry", "metadata": {"name": "t"}, "spec": {}}
    wanted = key("Telemetry", "t", "telemetry.istio.io")
    await undefine(clean, name)
    async with following(clean) as followed:
        await followed.until(lambda s: s.objects)
        for _ in range(2):
            await clean.apply(f"{DEFINITIONS}/{name}", definition, "test")
            async with asyncio.timeout(SOON):
                while True:
                    try:
                        await clean.create(telemetry, body)
                        break
                    except ApiError as e:
                        if e.status != 404:
                            raise
                        await asyncio.sleep(0.1)
            await followed.until(lambda s: wanted in s.objects)
            await undefine(clean, name)
            await followed.until(lambda s: wanted not in s.objects)
    await install_definitions(clean, "istio")
    assert not [f for state in followed.states for f in state.faults]


async def test_api_server_away(clean: Client, relay: Relay, relayed: Client) -> None:
    """Nothing changes meanwhile; what happened is known soon after, also that something was deleted."""
    await clean.create(RULES, rule("stays"))
    await clean.create(RULES, rule("goes"))
    async with following(relayed) as followed:
        await followed.until(lambda s: key("DestinationRule", "goes") in s.objects)
        lists = followed.source.lists
        await relay.cut()
        await clean.delete(f"{RULES}/goes")
        await clean.create(RULES, rule("comes"))
        state = await followed.until(lambda s: s.faults)
        assert "cannot be reached" in state.faults[0].reason and len(state.faults) == 1
        assert {key("DestinationRule", "stays"), key("DestinationRule", "goes")} <= set(state.objects)
        await relay.start()
        state = await followed.until(lambda s: not s.faults)
        state = await followed.until(lambda s: key("DestinationRule", "comes") in s.objects)
        await followed.until(lambda s: key("DestinationRule", "goes") not in s.objects)
        assert followed.source.lists == lists, "resumed by version: nothing was listed again"


async def test_too_old_a_version_is_listed_again_without_a_flap(
    clean: Client, relay: Relay, relayed: Client, mesh_server: ControlPlane
) -> None:
    await clean.create(RULES, rule("stays"))
    await clean.create(RULES, rule("goes"))
    async with following(relayed) as followed:
        await followed.until(lambda s: key("DestinationRule", "goes") in s.objects)
        lists = followed.source.lists
        began = len(followed.states)
        await relay.cut()
        await clean.delete(f"{RULES}/goes")
        await clean.create(RULES, rule("comes"))
        # An API server that has just started knows no older versions than that of its start.
        service = mesh_server.service("kube-apiserver")
        service.kill()
        service.start()
        await asyncio.to_thread(mesh_server.wait_ready)
        await relay.start()
        await followed.until(
            lambda s: (
                key("DestinationRule", "comes") in s.objects
                and key("DestinationRule", "goes") not in s.objects
                and not s.faults
            ),
            60.0,
        )
        assert followed.source.lists > lists
        for state in followed.states[began:]:
            assert key("DestinationRule", "stays") in state.objects
            assert Key("", "Namespace", "", "default") in state.objects


async def test_nothing_is_handed_out_before_all_is_known(relay: Relay, relayed: Client) -> None:
    await relay.cut()
    async with following(relayed) as followed:
        with pytest.raises(TimeoutError):
            await followed.until(lambda s: s.objects or s.faults, 3.0)
        assert not followed.source.ready
        await relay.start()
        await followed.until(lambda s: s.objects)


async def test_restart_while_the_api_server_is_away(
    clean: Client, relay: Relay, relayed: Client, tmp_path: Path
) -> None:
    store = LastGood(tmp_path / "last-good.json")
    await clean.create(RULES, rule("kept"))
    await clean.create(RULES, rule("old"))
    async with following(relayed, store) as followed:
        await followed.until(lambda s: key("DestinationRule", "kept") in s.objects)
        before = followed.state
    await relay.cut()
    await clean.delete(f"{RULES}/old")
    async with following(relayed, store) as followed:
        assert followed.source.ready
        assert followed.state == State(before.objects)
        await asyncio.sleep(2.0)
        assert followed.state.objects == before.objects
        await relay.start()
        state = await followed.until(lambda s: key("DestinationRule", "old") not in s.objects)
        assert key("DestinationRule", "kept") in state.objects


async def test_a_forbidden_kind_holds_up_no_other(clean: Client, mesh_server: ControlPlane) -> None:
    """An account that may read all but one kind: that one is named, all others are there; later it may."""
    await clean.create(RULES, rule("seen"))
    await clean.create(VIRTUAL_SERVICES, istio("VirtualService", "unseen", {"hosts": ["a"], "http": [ROUTE]}))
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "source-test"},
        "rules": without(allowed(), "virtualservices"),
    }
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "source-test"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "source-test"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "source-test"}],
    }
    roles = path_of("rbac.authorization.k8s.io/v1", "clusterroles", name="source-test")
    bindings = path_of("rbac.authorization.k8s.io/v1", "clusterrolebindings", name="source-test")
    await clean.apply(roles, role, "test")
    await clean.apply(bindings, binding, "test")
    access = Access.load(mesh_server.kubeconfig)
    access.headers = (("Impersonate-User", "source-test"),)
    try:
        async with Client(access) as limited, following(limited, patience=1.0) as followed:
            state = await followed.until(lambda s: s.objects)
            assert key("DestinationRule", "seen") in state.objects
            assert key("VirtualService", "unseen") not in state.objects
            (fault,) = state.faults
            assert "virtualservices.networking.istio.io" in fault.reason and "403" in fault.reason
            assert "get, list and watch" in fault.action
            await clean.apply(roles, role | {"rules": allowed()}, "test")
            await followed.until(
                lambda s: key("VirtualService", "unseen") in s.objects and not s.faults, 60.0
            )
    finally:
        await clean.delete(bindings)
        await clean.delete(roles)


def allowed() -> list[dict[str, Any]]:
    """What the controller's own account may do in the whole cluster."""
    return copy.deepcopy(rbac.rules("mycel-system")[0]["rules"])


def without(rules: list[dict[str, Any]], plural: str) -> list[dict[str, Any]]:
    for each in rules:
        each["resources"] = [r for r in each["resources"] if r != plural]
    return rules


async def test_secrets_only_when_referred_to(clean: Client) -> None:
    secrets = path_of("v1", "secrets", "default")
    gateways = path_of("networking.istio.io/v1", "gateways", "default")
    body = {"apiVersion": "v1", "kind": "Secret", "stringData": {"tls.crt": "one"}}
    await clean.create(secrets, body | {"metadata": {"name": "named"}})
    await clean.create(secrets, body | {"metadata": {"name": "other"}})
    gateway = istio(
        "Gateway",
        "g",
        {
            "selector": {"app": "g"},
            "servers": [
                {
                    "port": {"number": 443, "name": "https", "protocol": "HTTPS"},
                    "hosts": ["*"],
                    "tls": {"mode": "SIMPLE", "credentialName": "named"},
                }
            ],
        },
    )
    named = Key("", "Secret", "default", "named")
    async with following(clean) as followed:
        await followed.until(lambda s: s.objects)
        assert named not in followed.objects
        await clean.create(gateways, gateway | {"apiVersion": "networking.istio.io/v1"})
        state = await followed.until(lambda s: named in s.objects)
        assert [k.name for k in state.objects if k.kind == "Secret"] == ["named"]
        await clean.patch(f"{secrets}/named", {"stringData": {"tls.crt": "two"}})
        await followed.until(lambda s: s.objects[named].manifest["data"] == {"tls.crt": "dHdv"})
        await clean.delete(f"{gateways}/g")
        await followed.until(lambda s: named not in s.objects)
    for name in ("named", "other"):
        await clean.delete(f"{secrets}/{name}")


async def test_many_changes_are_few_states(clean: Client) -> None:
    async with following(clean) as followed:
        await followed.until(lambda s: s.objects)
        began = len(followed.states)
        await asyncio.gather(*(clean.create(RULES, rule(f"r-{i}")) for i in range(60)))
        await followed.until(lambda s: sum(k.name.startswith("r-") for k in s.objects) == 60)
        assert len(followed.states) - began < 60
