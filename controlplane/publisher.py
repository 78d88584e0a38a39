"""Hands the current snapshot to whoever serves it. Late and slow readers see the newest only."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from controlplane.model.snapshot import Snapshot


class Publisher:
    """One writer, many readers, one event loop."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._readers: set[asyncio.Event] = set()

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    def publish(self, snapshot: Snapshot) -> None:
        """Replace the snapshot; readers are woken if what is served has changed."""
        changed = snapshot.version != self._snapshot.version
        self._snapshot = snapshot
        if changed:
            for event in self._readers:
                event.set()

    @contextmanager
    def reader(self, event: asyncio.Event) -> Iterator[None]:
        """Set ``event`` on every change, for as long as the context lasts."""
        self._readers.add(event)
        try:
            yield
        finally:
            self._readers.discard(event)
