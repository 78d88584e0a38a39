"""Takes connections between two pods of this node into the splice and lets them out again.

Owns when the kernel's walk runs: when the kernel says that it would have something to do, and then at most every
:data:`PERIOD`, since a walk more often costs more than the splice gains. Nothing runs while nothing is to be done. Which
connections may enter, and when one can leave without losing a byte, the programs know (``bpf/lib/splice.h``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from agent.kernel.splices import Walk
from bpf.wire import SpliceCounter
from common import logs

_log = logs.get(__name__)

#: Seconds between two walks, at least.
PERIOD = 0.2
#: Seconds until applications that do not read what they have are looked at again, at most.
_LONGEST = 5.0


class Kernel(Protocol):
    """The kernel's half, as far as this needs it."""

    @property
    def supported(self) -> bool: ...
    def switch(self, on: bool) -> None: ...
    def fd(self) -> int: ...
    def hush(self) -> None: ...
    def walk(self) -> Walk: ...
    def unread(self) -> set[int]: ...
    def nudge(self, netns: int) -> None: ...
    def counters(self) -> Mapping[SpliceCounter, int]: ...


class Splicer:
    """See the module.

    :param borrow: gives the descriptor of a pod's namespace by its cookie, None where it is gone.
    :param on: whether connections of this node may enter at all; those that are in leave otherwise.
    """

    def __init__(
        self,
        kernel: Kernel,
        borrow: Callable[[int], AbstractContextManager[int | None]],
        *,
        on: bool = True,
    ) -> None:
        self._kernel = kernel
        self._borrow = borrow
        self._on = on
        self._wake = asyncio.Event()

    def changed(self) -> None:
        """Pods, or what they may, have changed."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. What is in the splice stays there."""
        if not self._kernel.supported:
            _log.warning(
                "nothing is spliced: this kernel has no tracepoint sock_recv_length, or no FIONREAD that would count what is"
            )
            return
        loop = asyncio.get_running_loop()
        self._kernel.switch(self._on)

        def woken() -> None:
            self._kernel.hush()
            self._wake.set()

        # A predecessor may have been woken and not have walked.
        self._wake.set()
        loop.add_reader(self._kernel.fd(), woken)
        try:
            pause = PERIOD
            while True:
                await self._wake.wait()
                self._wake.clear()
                try:
                    walk = await asyncio.to_thread(self._kernel.walk)
                    await self._nudge()
                except OSError as error:
                    _log.error("connections cannot enter or leave the splice", reason=str(error))
                    walk = Walk(0, 0, 1)
                if walk.waiting:
                    pause = PERIOD if walk.left else min(2 * pause, _LONGEST)
                    loop.call_later(pause, self._wake.set)
                else:
                    pause = PERIOD
                    if walk.entered:
                        # Whoever is told of something by TCP there does not stay.
                        loop.call_later(PERIOD, self._wake.set)
                await asyncio.sleep(PERIOD)
        finally:
            loop.remove_reader(self._kernel.fd())

    async def _nudge(self) -> None:
        for cookie in self._kernel.unread():
            with self._borrow(cookie) as netns:
                if netns is not None:
                    await asyncio.to_thread(self._kernel.nudge, netns)


_METRICS = {
    SpliceCounter.ENTERED: ("mycel_splice_entered", "Ends of connections that entered the splice."),
    SpliceCounter.LEFT: (
        "mycel_splice_left",
        "Ends of connections that went back to TCP before they closed.",
    ),
    SpliceCounter.OVERFLOWS: ("mycel_splice_overflows", "Connections whose reader fell behind."),
    SpliceCounter.FULL: ("mycel_splice_full", "Connections that stayed with TCP for lack of room."),
}


class SpliceMetrics(Collector):
    """What happened since the kernel's maps were made."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        counters = self._kernel.counters()
        for slot, (name, text) in _METRICS.items():
            yield CounterMetricFamily(name, text, value=counters[slot])
