"""What is sent to many at once: encoded once, packed for those who take that, and in turns."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import msgspec
import pytest

from controlplane import api
from controlplane.room import Room
from controlplane.stream.session import Session, Updates
from tests.controlplane.support import compile_all, pod

SMALL = compile_all(pod("a"))
LARGE = compile_all(*[pod(f"pod-{n}", f"10.1.{n // 250}.{n % 250}") for n in range(600)])


@pytest.mark.parametrize("takes", [True, False])
def test_large_updates_are_packed_for_those_who_take_it(takes: bool) -> None:
    updates = Updates()
    sessions = [Session(updates=updates) for _ in range(3)]
    encoded = []
    for session in sessions:
        update = session.next_update(LARGE)
        assert update is not None
        encoded.append(updates.encode(update, takes))
        assert api.decode_update(encoded[-1]) == update
    assert all(data is encoded[0] for data in encoded), "the first message is the same bytes for all"
    raw = msgspec.msgpack.decode(encoded[0])
    assert (bool(raw["packed"]), len(raw["upserts"])) == ((True, 0) if takes else (False, 601))


def test_small_updates_are_not() -> None:
    session, updates = Session(), Updates()
    update = session.next_update(SMALL)
    assert update is not None
    updates.whole(SMALL)
    assert updates.encode(update, True) == api.encode(update)


def test_changes_are_encoded_as_they_are() -> None:
    updates = Updates()
    one, two = Session(updates=updates), Session(SMALL.version, updates)
    for session in (one, two):
        first = session.next_update(SMALL)
        assert first is not None
        session.answer(api.Ack(first.nonce, first.version))
    for session in (one, two):
        update = session.next_update(LARGE)
        assert update is not None and not update.complete
        assert api.decode_update(updates.encode(update, True)) == update
        assert updates.encode(update) == api.encode(update)


async def test_large_messages_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room()
    async with AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(room.taken(1 << 20))
        async with asyncio.timeout(5), room.taken(1000):
            pass
        ninth = asyncio.create_task(stack.enter_async_context(room.taken(1 << 20)))
        await asyncio.sleep(0.05)
        assert not ninth.done()
        ninth.cancel()
    async with asyncio.timeout(5), room.taken(1 << 20):
        pass
    monkeypatch.setattr("controlplane.room._PATIENCE", 0.05)
    async with AsyncExitStack() as stack, asyncio.timeout(5):
        for _ in range(9):
            await stack.enter_async_context(room.taken(1 << 20))
    async with AsyncExitStack() as stack, asyncio.timeout(5):
        for _ in range(8):
            await stack.enter_async_context(room.taken(1 << 20))
