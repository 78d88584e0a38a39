"""When the walk over the splice runs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import Iterator

import pytest

from agent import splice
from agent.kernel.splices import Walk
from agent.splice import Splicer

IDLE = Walk(0, 0, 0)


class FakeSplices:
    """Notes when it was walked, and answers with ``answers``, then with nothing to do."""

    supported = True

    def __init__(self, *answers: Walk | OSError) -> None:
        self.answers = list(answers)
        self.left_unread: set[int] = set()
        self.nudged: list[int] = []
        self.walks: list[float] = []
        self.on: bool | None = None
        self._event = os.eventfd(0, os.EFD_NONBLOCK)

    def switch(self, on: bool) -> None:
        self.on = on

    def fd(self) -> int:
        return self._event

    def wake(self) -> None:
        os.eventfd_write(self._event, 1)

    def hush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)

    def walk(self) -> Walk:
        self.walks.append(time.monotonic())
        answer = self.answers.pop(0) if self.answers else IDLE
        if isinstance(answer, OSError):
            raise answer
        return answer

    def unread(self) -> set[int]:
        found, self.left_unread = self.left_unread, set()
        return found

    def nudge(self, netns: int) -> None:
        self.nudged.append(netns)

    def counters(self):
        return {}


@contextlib.contextmanager
def borrow(cookie: int) -> Iterator[int | None]:
    """The namespace of pod 1 is 101; others are gone."""
    yield 101 if cookie == 1 else None


async def walks_of(kernel: FakeSplices, seconds: float, *wakes: float, on: bool = True) -> list[float]:
    """When it was walked, in seconds from the first walk."""
    splicer = Splicer(kernel, borrow, on=on)
    task = asyncio.create_task(splicer.run())
    loop = asyncio.get_running_loop()
    for when in wakes:
        loop.call_later(when, kernel.wake)
    await asyncio.sleep(seconds)
    assert not task.done()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return [when - kernel.walks[0] for when in kernel.walks]


def test_walks_once_for_its_predecessor_and_then_when_woken(monkeypatch):
    monkeypatch.setattr(splice, "PERIOD", 0.05)
    kernel = FakeSplices()
    walks = asyncio.run(walks_of(kernel, 1.0, 0.25))
    assert len(walks) == 2
    assert kernel.on is True


def test_never_more_often_than_the_period(monkeypatch):
    monkeypatch.setattr(splice, "PERIOD", 0.1)
    kernel = FakeSplices()
    walks = asyncio.run(walks_of(kernel, 0.55, *(n / 100 for n in range(50))))
    assert 2 <= len(walks) <= 6
    assert all(later - earlier >= 0.1 for earlier, later in itertools.pairwise(walks))


def test_comes_back_less_and_less_often_for_applications_that_do_not_read(monkeypatch):
    monkeypatch.setattr(splice, "PERIOD", 0.02)
    kernel = FakeSplices(*[Walk(0, 0, 1)] * 100)
    walks = asyncio.run(walks_of(kernel, 0.8))
    gaps = [later - earlier for earlier, later in itertools.pairwise(walks)]
    # A machine with much to do makes them longer.
    assert gaps and all(gap >= 0.04 * 2**number for number, gap in enumerate(gaps))


def test_goes_on_after_an_error(monkeypatch):
    monkeypatch.setattr(splice, "PERIOD", 0.02)
    kernel = FakeSplices(OSError(5, "no"), Walk(0, 1, 0))
    assert len(asyncio.run(walks_of(kernel, 1.0))) == 2


def test_looks_once_more_at_those_that_have_entered(monkeypatch):
    monkeypatch.setattr(splice, "PERIOD", 0.02)
    kernel = FakeSplices(Walk(2, 0, 0))
    assert len(asyncio.run(walks_of(kernel, 1.0))) == 2


def test_tells_those_that_have_left_of_what_is_there(monkeypatch):
    monkeypatch.setattr(splice, "PERIOD", 0.02)
    kernel = FakeSplices(Walk(0, 3, 0))
    kernel.left_unread = {1, 2}
    asyncio.run(walks_of(kernel, 0.2))
    assert kernel.nudged == [101]


def test_switched_off(monkeypatch):
    monkeypatch.setattr(splice, "PERIOD", 0.02)
    kernel = FakeSplices()
    asyncio.run(walks_of(kernel, 0.1, on=False))
    assert kernel.on is False


def test_kernel_that_cannot(caplog: pytest.LogCaptureFixture):
    kernel = FakeSplices()
    kernel.supported = False
    asyncio.run(asyncio.wait_for(Splicer(kernel, borrow).run(), 1))
    assert kernel.walks == [] and kernel.on is None
