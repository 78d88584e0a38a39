"""Which walks the sweeper takes, and until when it asks the kernel again."""

from __future__ import annotations

import asyncio
import contextlib
import os

import pytest

from agent.kernel import Connection, Event, Reason, Via
from agent.namespaces import Namespaces
from agent.sweeper import Sweeper
from tests.agent.fakes import FakeKernel

COOKIE = 1001


class Forgetful(FakeKernel):
    """Tells of a part only, as the real one may when others close while it is asked."""

    def refused_now(self) -> list[Connection]:
        return self.refused[:2]


def connection(port, cookie=COOKIE):
    return Connection(cookie, ("10.0.1.2", port), ("10.0.1.1", 80), 16, 17, Via.DIRECT, 1, False, 0, 0, port)


def event(reason):
    return Event(reason, COOKIE, 16, 17, ("10.0.1.2", 1), ("10.0.1.1", 80))


async def until_none_is_refused(kernel):
    for _ in range(500):
        if not kernel.refused:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still there: {kernel.refused}")


@pytest.fixture
def kernel():
    with contextlib.closing(Forgetful()) as kernel:
        yield kernel


@pytest.fixture
def sweeper(kernel):
    namespaces = Namespaces()
    netns = os.open("/proc/self/ns/net", os.O_RDONLY)
    namespaces.hold(COOKIE, netns)
    os.close(netns)
    yield Sweeper(kernel, namespaces, str)
    namespaces.release_others(())


async def test_a_walk_goes_on_until_nothing_is_refused(kernel, sweeper):
    kernel.refused = [connection(port) for port in range(1, 8)]
    assert await sweeper.walk() == 7
    assert (kernel.refused, sweeper.destroyed) == ([], 7)


async def test_a_walk_ends_when_nothing_can_be_ended(kernel, sweeper):
    kernel.refused = [connection(1, cookie=5), connection(2, cookie=5)]
    assert await asyncio.wait_for(sweeper.walk(), 5) == 0


async def test_what_is_established_late_is_ended(kernel, sweeper):
    """However late; and at the start what a predecessor did not come to."""
    kernel.refused = [connection(1)]
    task = asyncio.create_task(sweeper.run())
    try:
        for port in (2, 3):
            await until_none_is_refused(kernel)
            kernel.refused = [connection(port)]
            sweeper.note([event(Reason.POLICY)])
            await asyncio.sleep(0.05)
            assert kernel.refused
            sweeper.note([event(Reason.POLICY), event(Reason.REVOKED)])
        await until_none_is_refused(kernel)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
