"""The timer wheel: late by at most a tick, never early, cancelled for good; one failing callback is its own affair."""

from __future__ import annotations

import asyncio
import time

from l7proxy.timers import Wheel


async def test_timers_fire_once_and_not_early() -> None:
    wheel = Wheel(asyncio.get_running_loop())
    fired: list[float] = []
    started = time.monotonic()
    for delay in (0.0, 0.02, 0.05):
        wheel.schedule(delay, lambda: fired.append(time.monotonic() - started))
    wheel.schedule(0.03, lambda: fired.append(-1.0)).cancel()
    await asyncio.sleep(0.3)
    assert len(fired) == 3
    assert all(at >= delay for at, delay in zip(fired, (0.0, 0.02, 0.05), strict=True))
    wheel.close()


async def test_a_failing_callback_stops_no_other() -> None:
    wheel = Wheel(asyncio.get_running_loop())
    fired = asyncio.Event()

    def fail() -> None:
        raise RuntimeError("a defect")

    wheel.schedule(0.01, fail)
    wheel.schedule(0.03, fired.set)
    async with asyncio.timeout(2):
        await fired.wait()
        fired.clear()
        wheel.schedule(0.01, fired.set)
        await fired.wait()
    wheel.close()
