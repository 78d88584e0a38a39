"""Which walks the sweeper takes, and until when it asks the kernel again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

import pytest

from agent.__main__ import parse
from agent.kernel import Connection, Event, Reason, Via
from agent.namespaces import Namespaces
from agent.sweeper import Sweeper
from tests.agent.fakes import FakeKernel

COOKIE = 1001


class Forgetful(FakeKernel):
    """Tells of a part only, as the real one may when others close while it is asked."""

    def refused_now(self) -> list[Connection]:
        return self.refused[:2]


def connection(port, cookie=COOKIE, *, revoked=False):
    ends = ("10.0.1.2", port), ("10.0.1.1", 80)
    return Connection(cookie, *ends, 16, 17, Via.DIRECT, 1, revoked, 0, 0, port)


def event(reason):
    return Event(reason, COOKIE, 16, 17, ("10.0.1.2", 1), ("10.0.1.1", 80))


async def until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def until_none_is_refused(kernel):
    await until(lambda: not kernel.refused)


@pytest.fixture
def kernel():
    with contextlib.closing(Forgetful()) as kernel:
        yield kernel


@pytest.fixture
def namespaces():
    held = Namespaces()
    netns = os.open("/proc/self/ns/net", os.O_RDONLY)
    held.hold(COOKIE, netns)
    os.close(netns)
    yield held
    held.release_others(())


@pytest.fixture
def sweeper(kernel, namespaces):
    return Sweeper(kernel, namespaces, str)


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
        # Its event may have found no room.
        kernel.refused = [connection(4)]
        kernel.fake_events_lost = 7
        sweeper.note([event(Reason.POLICY)])
        await until_none_is_refused(kernel)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("after", [None, 0.3])
async def test_what_was_allowed_once_may_go_on_for_as_long_as_is_configured(kernel, namespaces, after):
    """But not what was refused when it was established, by which a client would get around any policy."""
    sweeper = Sweeper(kernel, namespaces, str, after=after)
    kernel.refused = [connection(1)]
    began = time.monotonic()
    tasks = [asyncio.create_task(sweeper.run()), asyncio.create_task(sweeper.sweep())]
    try:
        kernel.refused.insert(0, connection(2, revoked=True))
        sweeper.note([event(Reason.REVOKED)])
        await until(lambda: kernel.refused == [connection(1)] or kernel.refused == [])
        if after is None:
            await tasks[1]
            assert kernel.refused == [connection(1)]
        else:
            await until_none_is_refused(kernel)
            assert time.monotonic() - began >= after
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    ("given", "after"), [("", 0.0), ("--revoke-after=5", 5.0), ("--revoke-after=never", None)]
)
def test_how_long_is_said_on_the_command_line(given, after):
    required = "--node=n --cgroup=/c --controller=c:1 --roots=/r --credential=/t"
    assert parse(f"{required} {given}".split()).revoke_after == after


@pytest.mark.parametrize("given", ["-1", "soon", "1.5", ""])
def test_what_is_neither_seconds_nor_never_is_refused(given):
    with pytest.raises(SystemExit):
        parse(
            [
                "--node=n",
                "--cgroup=/c",
                "--controller=c:1",
                "--roots=/r",
                "--credential=/t",
                f"--revoke-after={given}",
            ]
        )
