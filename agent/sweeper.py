"""Ends established connections that the policy of now would refuse.

Owns the walk over the kernel's open connections after verdicts changed, and the walks for those that were judged by the old
table and established after the swap: a second one a little later, and one whenever the kernel tells of such a connection (a
client may end its handshake as late as it likes). It judges nothing: the kernel says which ones its tables refuse.

How long a connection may outlive the policy that allowed it is configured; one that was refused when it was established may not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from agent.kernel import Connection, Event, Kernel, KernelError, Reason
from agent.namespaces import Namespaces
from common import logs

_log = logs.get(__name__)

#: Seconds to the second walk: longer than a handshake between two pods of one node takes.
SECOND_WALK = 0.25

#: Times that one walk asks the kernel again: its answer may leave some out while others close.
_ROUNDS = 10


class Sweeper:
    """``name`` gives a readable name to an identity's number, for the log."""

    def __init__(
        self,
        kernel: Kernel,
        namespaces: Namespaces,
        name: Callable[[int], str],
        *,
        after: float | None = 0.0,
    ) -> None:
        """``after``: seconds that connections have from a change that refuses them; None: until they end by themselves."""
        self._after = after
        self._kernel = kernel
        self._namespaces = namespaces
        self._name = name
        self._late = asyncio.Event()
        self._lost = kernel.events_lost()
        self.destroyed = 0

    def note(self, events: Iterable[Event]) -> None:
        """What the kernel told: a connection that was refused when it was established is open all the same.

        Whoever floods the kernel's events takes the room of others': what was lost may have been such a one.
        """
        before, self._lost = self._lost, self._kernel.events_lost()
        if self._lost != before or any(event.reason is Reason.REVOKED for event in events):
            self._late.set()

    async def run(self) -> None:
        """Walk once, since a predecessor may have changed verdicts and not come to it; then for what was noted."""
        self._late.set()
        async with asyncio.TaskGroup() as tasks:
            if self._after:
                tasks.create_task(self.sweep())
            while True:
                await self._late.wait()
                self._late.clear()
                await self.walk(never_allowed=self._after != 0)
                # One walk for all that comes meanwhile, however much that is.
                await asyncio.sleep(SECOND_WALK)

    async def sweep(self) -> None:
        """Walk when it is time, and once more after :data:`SECOND_WALK`."""
        if self._after is None:
            return
        await asyncio.sleep(self._after)
        await self.walk()
        await asyncio.sleep(SECOND_WALK)
        await self.walk()

    async def walk(self, *, never_allowed: bool = False) -> int:
        """End every connection that is refused now; how many those were.

        :param never_allowed: only those that were refused already when they were established.
        """
        try:
            ended = await asyncio.to_thread(self._walk, never_allowed)
        except (KernelError, OSError) as error:
            _log.error("open connections cannot be walked", reason=str(error))
            return 0
        for connection in ended:
            _log.info(
                "connection ended: policy refuses it now",
                source=self._name(connection.source),
                destination=self._name(connection.destination),
                client=_text(connection.client),
                server=_text(connection.server),
            )
        self.destroyed += len(ended)
        return len(ended)

    def _walk(self, never_allowed: bool) -> list[Connection]:
        ended: list[Connection] = []
        for _ in range(_ROUNDS):
            refused = self._kernel.refused_now()
            found = self._end(one for one in refused if one.revoked or not never_allowed)
            if not found:
                break
            ended += found
        return ended

    def _end(self, connections: Iterable[Connection]) -> list[Connection]:
        """Those that were ended."""
        ended = []
        for connection in connections:
            try:
                with self._namespaces.borrow(connection.netns_cookie) as netns:
                    if self._kernel.destroy(connection, netns):
                        ended.append(connection)
            except KeyError:
                continue  # its pod is gone, and the connection with it
            except (KernelError, OSError) as error:
                _log.error(
                    "connection that policy refuses could not be ended",
                    client=_text(connection.client),
                    server=_text(connection.server),
                    reason=str(error),
                )
        return ended


def _text(end: tuple[str, int]) -> str:
    return f"{end[0]}:{end[1]}"
