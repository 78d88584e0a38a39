"""Service-account tokens as credentials, against a real API server: who is let in, who is not, and for how long."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from common.kubernetes import Client, Unreachable
from controlplane.credentials import CredentialsUnavailable, Right
from controlplane.tokens import TokenReviewCredentials, read_claims
from lab.kubernetes import ControlPlane
from tests.controlplane.cluster import NAMESPACE, Api, connect

pytestmark = pytest.mark.privileged


class Switch(Client):
    """The real client, that can be cut off from its server; counts TokenReviews."""

    def __init__(self, client: Client) -> None:
        super().__init__(client.access)
        self.away = False
        self.reviews = 0

    async def create(self, path: str, body: Mapping[str, Any], **params: Any) -> dict[str, Any]:
        self.reviews += "tokenreviews" in path
        if self.away:
            raise Unreachable("cut off")
        return await super().create(path, body, **params)

    async def get(self, path: str, **params: Any) -> dict[str, Any]:
        if self.away:
            raise Unreachable("cut off")
        return await super().get(path, **params)


class World:
    """Credentials over the API server, a view of pods, and clocks that tests move."""

    def __init__(self, api: Api, client: Switch, folder: Path) -> None:
        self.api = api
        self.client = client
        self.view: dict[tuple[str, str], dict[str, Any]] = {}
        self.later = 0.0
        self.keys = folder / "issuer.json"
        self.credentials = self.make()

    def make(self) -> TokenReviewCredentials:
        return TokenReviewCredentials(
            self.client,
            NAMESPACE,
            lambda namespace, name: self.view.get((namespace, name)),
            self.keys,
            clock=lambda: time.time() + self.later,
            monotonic=lambda: time.monotonic() + self.later,
        )

    async def pod(
        self, name: str, node: str = "node-a", component: str = "nodeproxy", seen: bool = True
    ) -> str:
        """A pod of ours, in the controller's view or not yet; its token."""
        pod = await self.api.pod(name, node, f"mycel-{component}")
        if seen:
            self.view[NAMESPACE, name] = pod
        return await self.api.token(pod, f"mycel-{component}")


@pytest.fixture
async def world(api_server: ControlPlane, tmp_path: Path) -> AsyncIterator[World]:
    async with connect(api_server.kubeconfig) as api, Switch(api.client) as client:
        world = World(api, client, tmp_path)
        yield world
        pods = await api.client.list(f"/api/v1/namespaces/{NAMESPACE}/pods")
        for pod in pods["items"]:
            await api.remove_pod(pod["metadata"]["name"])


async def test_a_token_says_node_component_and_pod(world: World) -> None:
    token = await world.pod("proxy-1")
    caller = await world.credentials.caller(token)
    assert caller is not None
    assert (caller.node, caller.component, caller.pod) == ("node-a", "nodeproxy", "proxy-1")
    assert caller.uid == world.view[NAMESPACE, "proxy-1"]["metadata"]["uid"]
    assert [r for r in Right if caller.may(r)] == [Right.SUBSCRIBE, Right.SIGN]
    for component, rights in (("agent", [Right.SUBSCRIBE]), ("l7proxy", [Right.DISCOVERY])):
        caller = await world.credentials.caller(await world.pod(f"{component}-1", component=component))
        assert caller is not None
        assert [r for r in Right if caller.may(r)] == rights


async def test_strangers_cost_the_api_server_nothing(world: World) -> None:
    good = await world.pod("proxy-1")
    await world.credentials.caller(good)
    reviews = world.client.reviews
    pod = world.view[NAMESPACE, "proxy-1"]
    header, payload, signature = good.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    claims["kubernetes.io"]["node"]["name"] = "node-b"
    other = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    made_up = base64.urlsafe_b64encode(json.dumps({"alg": "RS256", "kid": "made up"}).encode()).decode()
    await world.api.account("default")
    for token in (
        "",
        "x" * 20_000,
        "a.b.c",
        f"{header}.{other}.{signature}",
        f"{header}.{payload}.{signature[:-4]}AAAA",
        f"{made_up}.{payload}.{signature}",
        await world.api.token(pod, "mycel-nodeproxy", audience="https://kubernetes.default.svc"),
        await world.api.token(None, "mycel-nodeproxy"),
        await world.api.token(None, "default"),
    ):
        assert await world.credentials.caller(token) is None, token[:40]
    assert world.client.reviews == reviews


async def test_a_clock_that_is_behind_keeps_no_new_pod_waiting(world: World) -> None:
    world.later = -120
    assert await world.credentials.caller(await world.pod("proxy-1")) is not None


async def test_an_account_of_another_namespace_is_a_stranger(world: World) -> None:
    pod = await world.api.pod("proxy-1", "node-a", "mycel-nodeproxy", namespace="elsewhere")
    token = await world.api.token(pod, "mycel-nodeproxy", namespace="elsewhere")
    assert read_claims(token, "elsewhere") is not None
    assert await world.credentials.caller(token) is None
    await world.api.remove_pod("proxy-1", "elsewhere")


async def test_one_review_for_many_calls(world: World) -> None:
    token = await world.pod("proxy-1")
    callers = await asyncio.gather(*(world.credentials.caller(token) for _ in range(50)))
    assert None not in callers
    assert world.client.reviews == 1
    world.later = 61
    assert await world.credentials.caller(token) is not None
    assert world.client.reviews == 2


async def test_a_pod_that_is_gone_is_out_at_once(world: World) -> None:
    token = await world.pod("proxy-1")
    caller = await world.credentials.caller(token)
    assert caller is not None
    assert world.credentials.ended(caller) == ""
    await world.api.remove_pod("proxy-1")
    del world.view[NAMESPACE, "proxy-1"]
    assert await world.credentials.caller(token) is None, "its cached review is worth nothing"
    assert "is gone" in world.credentials.ended(caller)


async def test_the_api_server_says_that_a_pod_is_gone_before_the_view_does(world: World) -> None:
    token = await world.pod("proxy-1")
    await world.api.remove_pod("proxy-1")
    assert await world.credentials.caller(token) is None


async def test_a_new_pod_need_not_be_in_view_yet(world: World) -> None:
    token = await world.pod("proxy-1", seen=False)
    assert await world.credentials.caller(token) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"spec": {"nodeName": "node-b"}},
        {"spec": {"serviceAccountName": "default"}},
        {"status": {"phase": "Failed"}},
    ],
)
async def test_who_contradicts_the_view_is_refused(world: World, change: dict[str, Any]) -> None:
    token = await world.pod("proxy-1")
    pod = world.view[NAMESPACE, "proxy-1"]
    world.view[NAMESPACE, "proxy-1"] = {**pod, **{k: {**pod[k], **v} for k, v in change.items()}}
    assert await world.credentials.caller(token) is None


async def test_without_the_api_server(world: World) -> None:
    """Known pods go on, by the issuer's keys; unknown ones have to wait; an ended token is no good."""
    token = await world.pod("proxy-1")
    unknown = await world.pod("proxy-2", seen=False)
    assert await world.credentials.caller(token) is not None
    world.client.away = True
    again = world.make()  # a restart: the keys come from the disk
    assert await again.caller(token) is not None
    with pytest.raises(CredentialsUnavailable, match="pod is not known"):
        await again.caller(unknown)
    world.later = 700
    assert await again.caller(token) is None
    world.later = 0
    world.keys.unlink()
    with pytest.raises(CredentialsUnavailable, match="key is not known"):
        await world.make().caller(token)
    world.client.away = False
    world.later = 20
    assert await again.caller(unknown) is not None, "the API server is back"


async def test_another_issuer_of_the_cluster_is_for_the_api_server_to_know(world: World) -> None:
    """``--service-account-issuer`` may be given several times, and be changed: what is signed by a known key is asked about."""
    token = await world.pod("proxy-1")
    assert await world.credentials.caller(token) is not None
    known = json.loads(world.keys.read_text())
    world.keys.write_text(json.dumps(known | {"issuer": "https://what-it-was-called-before.invalid"}))
    again = world.make()
    world.client.away = True
    with pytest.raises(CredentialsUnavailable, match="issuer is not the one that is known"):
        await again.caller(token)
    world.client.away = False
    world.later = 20
    assert await again.caller(token) is not None


def test_numbers_beyond_all_measure_are_no_claims() -> None:
    claims = {
        "aud": ["mycel.io"],
        "sub": f"system:serviceaccount:{NAMESPACE}:mycel-agent",
        "exp": 10**400,
        "kubernetes.io": {
            "namespace": NAMESPACE,
            "serviceaccount": {"name": "mycel-agent"},
            "pod": {"name": "p", "uid": "u"},
            "node": {"name": "n"},
        },
    }

    def token(**changes: Any) -> str:
        parts = ({"kid": "k"}, claims | changes)
        return ".".join(base64.urlsafe_b64encode(json.dumps(p).encode()).decode() for p in parts) + ".x"

    assert read_claims(token(exp=1), NAMESPACE) is not None
    assert read_claims(token(), NAMESPACE) is None


async def test_keys_on_disk_that_are_broken_are_fetched_anew(world: World) -> None:
    token = await world.pod("proxy-1")
    for text in ("", "{}", '{"issuer": "x", "keys": {"keys": [{"kty": "?"}]}}', '{"issuer": 1, "keys": []}'):
        world.keys.write_text(text)
        assert await world.make().caller(token) is not None
