"""The root in a Secret: one for all replicas, never written over, and a copy for when the API server is away."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from common.kubernetes import Access, Client, Unreachable
from controlplane.ca.authority import Authority, AuthorityError, make_root, utc_now
from controlplane.ca.secret import CONFIG_MAP, SECRET, PublicRoots, SharedRoot
from lab.kubernetes import ControlPlane

pytestmark = pytest.mark.privileged


class Away(Client):
    async def get(self, path: str, **params: Any) -> dict[str, Any]:
        raise Unreachable("cut off")


class World:
    def __init__(self, client: Client, namespace: str, folder: Path) -> None:
        self.client = client
        self.namespace = namespace
        self.folder = folder
        self.secrets = f"/api/v1/namespaces/{namespace}/secrets"
        self.maps = f"/api/v1/namespaces/{namespace}/configmaps"

    def root(self, replica: str, client: Client | None = None) -> SharedRoot:
        return SharedRoot(client or self.client, self.namespace, self.folder / replica)

    async def make(self, data: dict[str, bytes] | None = None) -> None:
        body: dict[str, Any] = {"metadata": {"name": SECRET, "labels": {"a": "b"}}}
        if data is not None:
            body["data"] = {k: base64.b64encode(v).decode() for k, v in data.items()}
        await self.client.create(self.secrets, body)

    async def secret(self) -> dict[str, Any]:
        return await self.client.get(f"{self.secrets}/{SECRET}")


@pytest.fixture
async def world(api_server: ControlPlane, api_namespace: str, tmp_path: Path) -> AsyncIterator[World]:
    async with Client(Access.load(api_server.kubeconfig)) as client:
        yield World(client, api_namespace, tmp_path)


async def test_all_replicas_that_start_at_once_have_one_root(world: World) -> None:
    await world.make()
    authorities = await asyncio.gather(*(world.root(str(n)).open() for n in range(8)))
    assert len({a.roots for a in authorities}) == 1
    secret = await world.secret()
    assert base64.b64decode(secret["data"]["root.pem"]).decode() == authorities[0].roots_pem
    assert secret["metadata"]["labels"] == {"a": "b"}
    late = await world.root("late").open()
    assert late.roots == authorities[0].roots


async def test_a_secret_that_is_applied_later_is_waited_for(world: World) -> None:
    opening = asyncio.get_running_loop().create_task(world.root("a").open())
    await asyncio.sleep(0.5)
    assert not opening.done()
    await world.make()
    assert isinstance(await opening, Authority)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"root.key": None}, "root.key is missing"),
        ({"root.pem": None}, "root.pem is missing"),
        ({"root.pem": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"}, "cannot be read"),
        ({"root.key": b""}, "cannot be read"),
        ({"root.key": make_root(utc_now()).key}, "is not the key of root.pem"),
    ],
)
async def test_a_broken_secret_is_an_error_and_stays_as_it_is(
    world: World, change: dict[str, bytes | None], reason: str
) -> None:
    root = make_root(utc_now())
    data = {"root.key": root.key, "root.pem": root.certificate} | change
    await world.make({k: v for k, v in data.items() if v is not None})
    before = await world.secret()
    with pytest.raises(AuthorityError, match=rf"Secret {world.namespace}/mycel-ca: .*{reason}"):
        await world.root("a").open()
    assert await world.secret() == before
    assert not (world.folder / "a").exists()


async def test_a_root_that_has_ended(world: World) -> None:
    root = make_root(utc_now() - timedelta(days=4000))
    await world.make({"root.key": root.key, "root.pem": root.certificate})
    with pytest.raises(AuthorityError, match="ended on"):
        await world.root("a").open()


async def test_the_copy_has_to_do_while_the_api_server_is_away(
    world: World, api_server: ControlPlane
) -> None:
    await world.make()
    authority = await world.root("a").open()
    assert {p.stat().st_mode & 0o777 for p in (world.folder / "a").iterdir()} == {0o600}
    async with Away(Access.load(api_server.kubeconfig)) as away:
        assert (await world.root("a", away).open()).roots == authority.roots
        waiting = asyncio.get_running_loop().create_task(world.root("new", away).open())
        await asyncio.sleep(0.3)
        assert not waiting.done(), "no root is made where there may be one"
        waiting.cancel()


async def test_the_copy_is_not_for_a_secret_that_is_gone(world: World) -> None:
    """Whoever has removed it is asked, rather than the old root be used on."""
    await world.make()
    await world.root("a").open()
    await world.client.delete(f"{world.secrets}/{SECRET}")
    waiting = asyncio.get_running_loop().create_task(world.root("a").open())
    await asyncio.sleep(0.3)
    assert not waiting.done()
    waiting.cancel()


async def test_an_emptied_secret_gets_the_root_in_use_back(world: World) -> None:
    """Removed and applied again: whoever has the root, running or as a copy, puts it back, and no second one is made."""
    await world.make()
    root = world.root("a")
    authority = await root.open()
    await world.client.delete(f"{world.secrets}/{SECRET}")
    await root.check(authority)
    await world.make()
    assert (await world.root("a").open()).roots == authority.roots, "after a restart"
    await world.client.delete(f"{world.secrets}/{SECRET}")
    await world.make()
    await root.check(authority)
    assert (await world.root("new").open()).roots == authority.roots, "while it runs"
    assert (await world.secret())["metadata"]["labels"] == {"a": "b"}
    # Of another root it only says so.
    other = make_root(utc_now())
    data = {"root.key": other.key, "root.pem": other.certificate}
    body = {"data": {k: base64.b64encode(v).decode() for k, v in data.items()}}
    await world.client.patch(f"{world.secrets}/{SECRET}", body)
    before = await world.secret()
    await root.check(authority)
    assert await world.secret() == before


async def test_the_public_roots_are_kept_right(world: World) -> None:
    await world.make()
    authority = await world.root("a").open()
    roots = PublicRoots(world.client, world.namespace, authority.roots_pem)
    await world.client.create(world.maps, {"metadata": {"name": CONFIG_MAP}, "data": {"more": "stays"}})
    assert await roots.put()
    assert not await roots.put()
    path = f"{world.maps}/{CONFIG_MAP}"
    data = (await world.client.get(path))["data"]
    assert data == {"roots.pem": authority.roots_pem, "more": "stays"}
    await world.client.patch(path, {"data": {"roots.pem": "broken"}})
    assert await roots.put()
    assert (await world.client.get(path))["data"] == data
