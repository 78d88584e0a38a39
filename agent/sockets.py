"""Makes the sockets that proxies ask for, in pods' namespaces.

Owns nothing: the descriptors are the caller's, the namespaces :class:`agent.namespaces.Namespaces`'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from agent import api
from agent.kernel import Kernel, KernelError
from agent.namespaces import Namespaces
from agent.proxies import SocketError

_T = TypeVar("_T")


class PodSockets:
    """See :class:`agent.proxies.Sockets`."""

    def __init__(self, kernel: Kernel, namespaces: Namespaces) -> None:
        self._kernel = kernel
        self._namespaces = namespaces

    async def listener(self, netns_cookie: int, addresses: tuple[str, ...], kind: api.ListenerKind) -> int:
        return await self._do(
            netns_cookie, lambda netns: self._kernel.make_listener(netns, addresses, kind.port)
        )

    def publish(self, addresses: tuple[str, ...], kind: api.ListenerKind, fd: int) -> None:
        try:
            for address in addresses:
                self._kernel.set_listener(address, kind.port, fd)
        except (KernelError, OSError) as error:
            raise SocketError(str(error)) from None

    def live(self, addresses: tuple[str, ...], kind: api.ListenerKind) -> int:
        found = {self._kernel.listener(address, kind.port) for address in addresses}
        return found.pop() if len(found) == 1 else 0

    async def outgoing(self, netns_cookie: int, purpose: api.Purpose, count: int, *, ipv6: bool) -> list[int]:
        create = {
            api.Purpose.OUTBOUND: self._kernel.create_outbound,
            api.Purpose.DELIVERY: self._kernel.create_delivery,
        }[purpose]
        return await self._do(netns_cookie, lambda netns: create(netns, count, ipv6=ipv6))

    async def _do(self, netns_cookie: int, work: Callable[[int], _T]) -> _T:
        try:
            with self._namespaces.borrow(netns_cookie) as netns:
                return await asyncio.to_thread(work, netns)
        except KeyError:
            raise SocketError("the pod's namespace is gone") from None
        except (KernelError, OSError) as error:
            raise SocketError(str(error)) from None
