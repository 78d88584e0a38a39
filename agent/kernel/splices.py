"""The splice as the kernel has it: the walk that takes connections in and lets them out, its switch, its counters.

Owns the pinned iterator ``splice`` and the maps ``splice_*``; when to walk is :mod:`agent.splice`'s, the rules are in
``bpf/lib/splice.h``.
"""

from __future__ import annotations

import struct
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from agent.kernel import namespace
from agent.kernel.ring import RingReader
from bpf import wire
from bpf.maps import Map
from bpf.wire import SpliceCounter, SpliceStep


class Walk(NamedTuple):
    """With how many ends of connections a walk did what."""

    entered: int
    left: int
    waiting: int  #: they have to leave, and their applications have not read everything yet


class Splices:
    """Counters may be asked for in any thread; all else is one caller's."""

    def __init__(self, folder: Path, maps: Mapping[str, Map]) -> None:
        self._pin = folder / "splice"
        self._nudge_pin = folder / "nudge"
        self._unread: set[int] = set()
        self._counters = maps["splice_counters"]
        self._wakes = maps["splice_wakes"]
        self._ring = RingReader(self._wakes)
        # Lookups share a buffer; metrics are asked for in threads of their own.
        self._lock = threading.Lock()

    def close(self) -> None:
        self._ring.close()

    @property
    def supported(self) -> bool:
        """False where the kernel has no tracepoint ``sock_recv_length``, or a FIONREAD that is blind: everything goes by TCP."""
        with self._lock:
            return self._get(SpliceCounter.OFF) != wire.SPLICE_UNSUPPORTED

    @property
    def on(self) -> bool:
        """Whether connections of this node may enter."""
        with self._lock:
            return self._get(SpliceCounter.OFF) == 0

    def switch(self, on: bool) -> None:
        """Whether connections of this node may enter. Those that are in leave at the next walks."""
        if self.supported:
            self._set(SpliceCounter.OFF, 0 if on else 1)

    def fd(self) -> int:
        """Readable when a walk would have something to do."""
        return self._wakes.fd

    def hush(self) -> None:
        """Let the descriptor be readable no more until the next wake."""
        for _ in self._ring.read():
            pass

    def walk(self) -> Walk:
        """Over all connections that may be spliced: some microseconds, and a tenth of one for each."""
        self.hush()
        # Before the walk: what comes up while it runs wakes the agent again.
        with self._lock:
            self._set(SpliceCounter.WOKEN, 0)
        data = self._pin.read_bytes()
        steps: Counter[int] = Counter()
        for (told,) in struct.iter_unpack("=Q", data):
            step = told & ((1 << wire.SPLICE_STEP_BITS) - 1)
            steps[step] += 1
            if step == SpliceStep.LEFT_UNREAD:
                self._unread.add(told >> wire.SPLICE_STEP_BITS)
        left = steps[SpliceStep.LEFT] + steps[SpliceStep.LEFT_UNREAD]
        return Walk(steps[SpliceStep.ENTERED], left, steps[SpliceStep.WAITS])

    def unread(self) -> set[int]:
        """Namespaces, by cookie, of ends that have left since the last call while TCP had something for them: :meth:`nudge`."""
        found, self._unread = self._unread, set()
        return found

    def nudge(self, netns: int) -> None:
        """Tell applications in a namespace again of what is there: one that reads by edges may have taken a short read for all.

        :raises OSError: it cannot be entered.
        """
        namespace.inside(netns, self._nudge_pin.read_bytes)

    def counters(self) -> dict[SpliceCounter, int]:
        """What happened since the maps were made."""
        with self._lock:
            return {slot: self._get(slot) for slot in SpliceCounter if slot > SpliceCounter.WOKEN}

    def _get(self, slot: SpliceCounter) -> int:
        value = self._counters.lookup(struct.pack("=I", slot))
        return int(struct.unpack("=Q", value)[0]) if value else 0

    def _set(self, slot: SpliceCounter, value: int) -> None:
        self._counters.update(struct.pack("=I", slot), struct.pack("=Q", value))
