"""Many short-lived timers at little cost: a wheel of slots, driven by one event-loop timer while it holds anything.

Owns nothing but the wheel. A timer fires up to one tick (10 ms) late, never early; to set and to cancel one costs a
dictionary operation, where the event loop's own costs a heap entry and an object of libuv.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common import logs

_log = logs.get(__name__)

_TICK = 0.010


class Timer:
    """A pending call; :meth:`cancel` any time, also after it fired."""

    __slots__ = ("_slot", "callback")

    def __init__(self, callback: Callable[[], None], slot: dict[Timer, None]) -> None:
        self.callback = callback
        self._slot = slot
        slot[self] = None

    def cancel(self) -> None:
        self._slot.pop(self, None)


class Wheel:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: dict[int, dict[Timer, None]] = {}
        self._handle: asyncio.TimerHandle | None = None

    def schedule(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call back once after ``delay`` seconds."""
        now = self._loop.time()
        at = int((now + delay) / _TICK) + 1
        slot = self._slots.get(at)
        if slot is None:
            slot = self._slots[at] = {}
            if self._handle is None:
                self._handle = self._loop.call_later(_TICK, self._turn)
        return Timer(callback, slot)

    def _turn(self) -> None:
        reached = int(self._loop.time() / _TICK)
        due = [at for at in self._slots if at <= reached]
        for at in sorted(due):
            slot = self._slots.pop(at)
            while slot:
                timer, _ = slot.popitem()
                try:
                    timer.callback()
                except Exception as error:
                    # A defect of one request must not stop every other's timeouts.
                    _log.exception("timer failed", error)
        self._handle = self._loop.call_later(_TICK, self._turn) if self._slots else None

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._slots.clear()
