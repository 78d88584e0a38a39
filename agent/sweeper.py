"""Ends established connections that the policy of now would refuse.

Owns the walk over the kernel's open connections after verdicts changed, and the second walk a little later for those that were
judged by the old table and established after the swap. It judges nothing: the kernel says which ones its tables refuse.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent.kernel import Connection, Kernel, KernelError
from agent.namespaces import Namespaces
from common import logs

_log = logs.get(__name__)

#: Seconds to the second walk: longer than a handshake between two pods of one node takes.
SECOND_WALK = 0.25


class Sweeper:
    """``name`` gives a readable name to an identity's number, for the log."""

    def __init__(self, kernel: Kernel, namespaces: Namespaces, name: Callable[[int], str]) -> None:
        self._kernel = kernel
        self._namespaces = namespaces
        self._name = name
        self.destroyed = 0

    async def sweep(self) -> None:
        """Walk now and once more after :data:`SECOND_WALK`."""
        await self.walk()
        await asyncio.sleep(SECOND_WALK)
        await self.walk()

    async def walk(self) -> int:
        """End every connection that is refused now; how many those were."""
        try:
            ended = await asyncio.to_thread(self._walk)
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

    def _walk(self) -> list[Connection]:
        ended = []
        for connection in self._kernel.refused_now():
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
