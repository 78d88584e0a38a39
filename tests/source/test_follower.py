"""Following one collection of a scripted API server: when it is given up, and when it is listed again; what is kept of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, cast

from aiohttp import web

from common.kubernetes import Access, Client
from common.tasks import Tasks
from controlplane.source import Key
from controlplane.source.collection import Collection, Table
from controlplane.source.definitions import Definitions
from controlplane.source.follower import Follower
from controlplane.source.kinds import DEFINITIONS, Kind
from tests.source.conftest import SOON, busy, scripted


class Kept:
    """A sink; remembers what is in force."""

    def __init__(self) -> None:
        self.names: set[str] | None = None
        self._pages: list[str] = []

    def restart(self) -> None:
        self._pages = []

    def page(self, items: Sequence[dict[str, Any]]) -> None:
        self._pages += [i["metadata"]["name"] for i in items]

    def listed(self) -> None:
        self.names = set(self._pages)

    def put(self, item: dict[str, Any]) -> None:
        (self.names or set()).add(item["metadata"]["name"])

    def remove(self, item: dict[str, Any]) -> None:
        (self.names or set()).discard(item["metadata"]["name"])


@contextlib.asynccontextmanager
async def followed(access: Access, patience: float) -> AsyncIterator[tuple[Follower, Kept]]:
    sink = Kept()
    async with Client(access) as client:
        follower = Follower(client, "/x", sink, lambda: None, patience=patience)
        task = asyncio.create_task(follower.run())
        try:
            yield follower, sink
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(SOON):
        while not holds():  # noqa: ASYNC110  (nobody tells)
            await asyncio.sleep(0.02)


def listing(*names: str, version: str = "5") -> Callable[[web.Request], web.Response]:
    items = [{"metadata": {"name": n, "resourceVersion": "1"}} for n in names]
    return lambda _: web.json_response({"metadata": {"resourceVersion": version}, "items": items})


def unreachable(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def watched(
    on_list: Callable[[web.Request], Any], on_watch: Callable[[web.Request], Any]
) -> Callable[[web.Request], Any]:
    return lambda request: (on_watch if "watch" in request.query else on_list)(request)


async def silent(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await asyncio.sleep(60)
    return response


async def test_a_refusal_counts_only_once_it_lasts() -> None:
    """A server that has just started refuses what it allows later; what is forbidden for good holds up nobody for ever."""
    starting = [busy(403), busy(500), busy(403), busy(503), busy(403)]
    async with scripted(*starting, watched(listing("a"), silent)) as (access, asked):
        async with followed(access, 60.0) as (follower, sink):
            await until(lambda: len(asked) == 5)
            assert not follower.settled and sink.names is None
            await until(lambda: follower.settled)
            assert follower.synced and sink.names == {"a"}
    async with scripted(busy(403)) as (access, _), followed(access, 1.0) as (follower, _):
        await until(lambda: follower.settled)
        assert not follower.synced and "403" in str(follower.problem)


async def test_time_without_a_server_is_no_refusal() -> None:
    """However long it was away, or busy: that it refuses at first when it is back says nothing yet."""
    away = [*[unreachable] * 6, busy(429, **{"Retry-After": "0"}), busy(504), busy(503)]
    async with scripted(*away, busy(403)) as (access, asked), followed(access, 0.0) as (follower, _):
        await until(lambda: len(asked) >= len(away) + 1)
        await until(lambda: follower.problem is not None)
        assert not follower.settled
        await until(lambda: follower.settled)
        assert len(asked) >= len(away) + 4
    async with scripted(busy(503)) as (access, asked), followed(access, 0.0) as (follower, _):
        await until(lambda: len(asked) >= 6)
        assert follower.problem is not None and not follower.settled


async def test_a_version_that_the_server_refuses_is_listed_again() -> None:
    """It says so in other ways than 410 too: after a restore from a backup, the version is one of the future."""
    async with scripted(watched(listing("a"), busy(504))) as (access, _):
        async with followed(access, 60.0) as (follower, sink):
            await until(lambda: follower.lists >= 2)
            assert sink.names == {"a"}


async def test_what_is_no_list_empties_nothing() -> None:
    """A list without a version, one object where a list was asked for, what a proxy makes up."""
    ended = web.json_response({"kind": "Status", "code": 410, "reason": "Expired"}, status=410)
    wrong = [
        lambda _: web.json_response({"metadata": {"resourceVersion": "7", "name": "a"}, "kind": "Pod"}),
        lambda _: web.json_response({"metadata": {}, "items": []}),
        listing(version=""),
        lambda _: web.json_response([]),
        lambda _: web.json_response({"items": []}),
    ]
    script = [listing("a"), lambda _: ended, *wrong, watched(listing("a", "b"), silent)]
    async with scripted(*script) as (access, asked), followed(access, 60.0) as (_, sink):
        seen: set[frozenset[str]] = set()

        def done() -> bool:
            if sink.names is not None:
                seen.add(frozenset(sink.names))
            return sink.names == {"a", "b"}

        await until(done)
        assert seen == {frozenset("a"), frozenset("ab")}
        assert len(asked) >= len(script)


class GoneMeanwhile:
    """A client whose definition goes while it is asked for; the answer comes after the watch has said so."""

    def __init__(self, name: str) -> None:
        self._item = {"metadata": {"name": name, "resourceVersion": "1"}}
        self.definitions: Definitions | None = None

    async def pages(self, path: str, **params: Any) -> AsyncIterator[tuple[Sequence[dict[str, Any]], str]]:
        yield [self._item], "1"

    async def watch(self, path: str, **params: Any) -> AsyncIterator[dict[str, Any]]:
        await asyncio.Event().wait()
        yield {}

    async def get(self, path: str, **params: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        assert self.definitions is not None
        self.definitions.remove(self._item)
        kind = DEFINITIONS[self._item["metadata"]["name"]]
        return {
            **self._item,
            "spec": {"names": {"kind": kind.kind}, "versions": [{"name": "v1", "served": True}]},
            "status": {"conditions": [{"type": "Established", "status": "True"}]},
        }


async def test_a_definition_that_goes_while_it_is_read_is_gone() -> None:
    told: list[Mapping[Kind, str]] = []
    client = GoneMeanwhile("telemetries.telemetry.istio.io")
    tasks = Tasks()
    definitions = Definitions(cast(Client, client), tasks, told.append, lambda: None)
    client.definitions = definitions
    definitions.start()
    try:
        await until(lambda: definitions.settled)
        assert told == [{}]
    finally:
        await tasks.cancel()


def test_what_was_made_anew_does_not_inherit_the_last_good_version() -> None:
    """An object was deleted and made again while nobody listened, and the new one is refused."""
    kind = Kind("networking.istio.io", "DestinationRule", "destinationrules")
    key = Key(kind.group, kind.kind, "default", "x")
    table = Table(lambda m: [("spec", "bad")] if m["spec"]["bad"] else [], lambda _: None)
    collection = Collection(table, kind, "v1")

    def item(uid: str, version: str, *, bad: bool) -> dict[str, Any]:
        metadata = {"name": "x", "namespace": "default", "uid": uid, "resourceVersion": version}
        return {"metadata": metadata, "spec": {"bad": bad}}

    def relist(found: dict[str, Any]) -> None:
        collection.restart()
        collection.page([found])
        collection.listed()

    relist(item("one", "1", bad=False))
    relist(item("one", "2", bad=True))
    assert key in table.objects and key in table.refused
    relist(item("two", "3", bad=True))
    assert key not in table.objects and key in table.refused
    # The kind itself goes: what was refused goes with it, and is no fault for ever.
    assert table.of({(kind.group, kind.kind)}) == [key] and not table.of({(kind.group, "Gateway")})
    relist(item("two", "4", bad=False))
    assert key in table.objects and not table.faults
