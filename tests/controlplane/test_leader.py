"""The Lease: one leads, another takes over in time, and none of it depends on what clocks say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from common.kubernetes import Access, Client, Unreachable
from controlplane.leader import LEASE, Leader, Times
from lab.kubernetes import ControlPlane
from tests.controlplane.support import eventually

pytestmark = pytest.mark.privileged
TIMES = Times(duration=3.0, deadline=2.0, retry=0.2)


class Cut(Client):
    """A client that can be cut off."""

    away = False

    async def replace(self, path: str, body: Mapping[str, Any], **params: Any) -> dict[str, Any]:
        if self.away:
            raise Unreachable("cut off")
        return await super().replace(path, body, **params)


class Slow(Client):
    """A client whose writes are carried out at once and answered late; after ``last`` it gets no answer any more."""

    delay = 0.8
    landed = 0.0
    last = False
    silent = False

    async def get(self, path: str, **params: Any) -> dict[str, Any]:
        if self.silent:
            await asyncio.Event().wait()
        return await super().get(path, **params)

    async def replace(self, path: str, body: Mapping[str, Any], **params: Any) -> dict[str, Any]:
        answer = await super().replace(path, body, **params)
        self.landed, self.silent = time.monotonic(), self.last
        await asyncio.sleep(self.delay)
        return answer


class Replica:
    """One that takes part; what it worked on is counted."""

    def __init__(self, client: Client, namespace: str, name: str) -> None:
        self.client = client
        self.working = 0
        self.began = 0
        self.broken = asyncio.Event()
        self.leader = Leader(client, namespace, name, self._work, CollectorRegistry(), TIMES)
        self.task = asyncio.get_running_loop().create_task(self.leader.run())

    async def _work(self) -> None:
        self.began += 1
        self.working += 1
        try:
            await self.broken.wait()
            self.broken.clear()
            raise ValueError("work that fails")
        finally:
            self.working -= 1

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})


class World:
    def __init__(self, server: ControlPlane, admin: Client, namespace: str) -> None:
        self.access = Access.load(server.kubeconfig)
        self.admin = admin
        self.namespace = namespace
        self.path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self.replicas: list[Replica] = []
        self.clients: list[Client] = []

    async def join(self, name: str, kind: type[Client] = Cut) -> Replica:
        client = await kind(self.access).__aenter__()
        self.clients.append(client)
        replica = Replica(client, self.namespace, name)
        self.replicas.append(replica)
        return replica

    async def lease(self) -> dict[str, Any]:
        spec: dict[str, Any] = (await self.admin.get(f"{self.path}/{LEASE}")).get("spec") or {}
        return spec


@pytest.fixture
async def world(api_server: ControlPlane, api_namespace: str) -> AsyncIterator[World]:
    async with Client(Access.load(api_server.kubeconfig)) as admin:
        world = World(api_server, admin, api_namespace)
        await admin.create(world.path, {"metadata": {"name": LEASE}})
        yield world
        for replica in world.replicas:
            await replica.stop()
        for client in world.clients:
            await client.__aexit__(None, None, None)


async def leads(replica: Replica) -> bool:
    return replica.leader.leading and replica.working == 1


async def test_one_leads_and_the_other_takes_over_in_time(world: World) -> None:
    a = await world.join("a")
    await eventually(lambda: leads(a))
    b = await world.join("b")
    await asyncio.sleep(TIMES.duration + 0.5)
    assert not b.leader.leading
    assert b.began == 0, "while the other renews"
    assert (await world.lease())["holderIdentity"] == "a"
    # Killed: nothing is given up.
    a.leader._release = asyncio.sleep  # type: ignore[method-assign,assignment]
    a.task.cancel()
    killed = time.monotonic()
    await eventually(lambda: leads(b))
    assert time.monotonic() - killed <= TIMES.duration + 1.0
    lease = await world.lease()
    assert (lease["holderIdentity"], lease["leaseTransitions"]) == ("b", 2)


async def test_who_ends_gives_it_up(world: World) -> None:
    a = await world.join("a")
    await eventually(lambda: leads(a))
    b = await world.join("b")
    await asyncio.sleep(0.3)
    await a.stop()
    assert a.working == 0
    ended = time.monotonic()
    await eventually(lambda: leads(b))
    assert time.monotonic() - ended < 1.5, "much sooner than the lease's duration"


async def test_who_cannot_renew_stops_before_another_begins(world: World) -> None:
    a = await world.join("a")
    await eventually(lambda: leads(a))
    b = await world.join("b")
    assert isinstance(a.client, Cut)
    a.client.away = True
    both = False
    async with asyncio.timeout(10):
        while not b.leader.leading:
            both = both or bool(a.working and b.working)
            await asyncio.sleep(0.02)
    assert not both
    assert a.working == 0
    a.client.away = False
    await asyncio.sleep(1.0)
    assert not a.leader.leading


async def test_slow_answers_give_a_leader_no_more_time(world: World) -> None:
    """Others count from when a write is carried out, not from when its writer hears of it."""
    a = await world.join("a", Slow)
    await eventually(lambda: leads(a))
    assert isinstance(a.client, Slow)
    a.client.last = True

    async def cut_off() -> bool:
        assert isinstance(a.client, Slow)
        return a.client.silent

    await eventually(cut_off)

    async def stopped() -> bool:
        return a.working == 0

    await eventually(stopped)
    assert time.monotonic() - a.client.landed < TIMES.duration


async def test_the_clock_of_whoever_wrote_it_means_nothing(world: World) -> None:
    """A lease that says it ended long ago, or ends in a year, is judged by when it changes as seen here."""
    for stamp in ("2001-01-01T00:00:00.000000Z", "2099-01-01T00:00:00.000000Z"):
        lease = await world.admin.get(f"{world.path}/{LEASE}")
        lease["spec"] = {
            "holderIdentity": "gone",
            "leaseDurationSeconds": 2,
            "renewTime": stamp,
            "acquireTime": stamp,
        }
        await world.admin.replace(f"{world.path}/{LEASE}", lease)
        replica = await world.join("a")
        began = time.monotonic()
        await eventually(lambda replica=replica: leads(replica))  # type: ignore[misc]
        assert 1.8 <= time.monotonic() - began <= 4.0
        await replica.stop()


async def test_work_that_fails_is_taken_up_again(world: World) -> None:
    a = await world.join("a")
    await eventually(lambda: leads(a))
    a.broken.set()

    async def again() -> bool:
        return a.began == 2 and await leads(a)

    await eventually(again)


async def test_a_lease_that_is_not_there_yet(world: World) -> None:
    await world.admin.delete(f"{world.path}/{LEASE}")
    a = await world.join("a")
    await asyncio.sleep(0.5)
    assert not a.leader.leading
    await world.admin.create(world.path, {"metadata": {"name": LEASE}})
    await eventually(lambda: leads(a))
