"""Room for what is sent at once: a mesh's whole configuration to every client that (re)connects would be gigabytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

#: Bytes from which a message counts as large.
_LARGE = 128 << 10
#: Large messages on their way at once. Each is a copy that gRPC makes, and held until the client's window has taken it.
_AT_ONCE = 8
#: Seconds after which a client that takes its message slowly no longer keeps others waiting.
_PATIENCE = 15.0


class Room:
    """Shared by all streams of a process."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(_AT_ONCE)

    @asynccontextmanager
    async def taken(self, size: int) -> AsyncIterator[None]:
        """Hold room for a message of this many bytes while it is being written; small ones need none."""
        if size < _LARGE:
            yield
            return
        await self._free.acquire()
        held = True

        def give_up() -> None:
            nonlocal held
            if held:
                held = False
                self._free.release()

        timer = asyncio.get_running_loop().call_later(_PATIENCE, give_up)
        try:
            yield
        finally:
            timer.cancel()
            give_up()
