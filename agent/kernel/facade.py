"""Class :class:`Kernel`: what the agent can tell the kernel and ask it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from agent.kernel.model import (
    Backend,
    Connection,
    Event,
    FlowCounters,
    FlowKey,
    Peer,
    Pod,
    Pressure,
)
from bpf.maps import MapFullError
from bpf.wire import Role

__all__ = ["Kernel", "KernelError", "MapFullError"]


class KernelError(Exception):
    """The kernel refused something; the message names the object and the reason."""


class Kernel:
    """The pinned maps, programs and links of one node.

    Methods may be called from any thread; each call is done when it returns. They take milliseconds at most, but for
    ``add_pod`` and ``set_policy`` (tens, since they wait for running programs or work in the pod's namespace).
    ``netns`` is always a descriptor of the pod's network namespace that stays the caller's; none is kept here, so that
    nothing of ours outlives ``remove_pod``. Every method is idempotent. Apart from ``MapFullError`` (an OSError) they
    raise KernelError, ValueError for what no kernel could take, and nothing is half done after either.
    """

    def __init__(self, pins: Path) -> None:
        """Open what the loader pinned in ``pins`` (the folder that holds ``v<ABI>``).

        :raises KernelError: it is not there, or not whole.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the descriptors; everything in the kernel stays as it is."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Roles

    def set_role(self, cgroup_id: int, role: Role) -> None:
        """Processes of the cgroup (not of those below it) have this role when they dial; NONE removes it."""
        raise NotImplementedError

    def roles(self) -> dict[int, Role]:
        """By cgroup id."""
        raise NotImplementedError

    # Pods

    def add_pod(self, pod: Pod, netns: int) -> None:
        """Enrol a pod: refuse everything inbound until its policy is set, capture its dials from now on.

        In its namespace: sk_lookup link, ``tcp_fwmark_accept``, the rule and the table that bring answers to delivered
        connections back. Called again with another address or identity it changes those. An address that another
        pod had belongs to this one from now on.
        """
        raise NotImplementedError

    def remove_pod(self, netns_cookie: int) -> None:
        """Forget a pod: no element about it stays in any map, no link in its namespace, no listener.

        Its namespace may be gone already. The policy goes too. Open connections stay counted until they close.
        """
        raise NotImplementedError

    def pods(self) -> dict[int, Pod]:
        """By netns cookie, as the kernel has them (also those of a predecessor of this process)."""
        raise NotImplementedError

    def missing(self, netns_cookie: int, netns: int) -> list[str]:
        """What a pod lacks to be enforced, in words; empty when it is whole (CNI CHECK)."""
        raise NotImplementedError

    def create_listener(self, netns: int, address: str, port: int) -> int:
        """A listening, non-blocking TCP socket in the pod's namespace, known as the one for that port from now on.

        :param port: PORT_OUTBOUND, PORT_OUTBOUND_L7 or PORT_HBONE.
        :returns: its descriptor, the caller's. The kernel's entry goes when the last duplicate is closed.
        """
        raise NotImplementedError

    def set_listener(self, address: str, port: int, fd: int) -> None:
        """Make an existing listening socket the one for (pod's address, port)."""
        raise NotImplementedError

    def has_listener(self, address: str, port: int) -> bool:
        """Whether there is a live one."""
        raise NotImplementedError

    def create_outbound(self, netns: int, count: int = 1) -> list[int]:
        """Unconnected, non-blocking TCP sockets (TCP_NODELAY) in the pod's namespace, for the proxies' own dials."""
        raise NotImplementedError

    def create_delivery(self, netns: int, count: int = 1) -> list[int]:
        """The same, with IP_TRANSPARENT and the delivery mark: may bind a client's address without capabilities."""
        raise NotImplementedError

    # Tables

    def set_policy(self, netns_cookie: int, table: Mapping[tuple[int, int], bool], generation: int) -> None:
        """Swap a pod's whole policy: (identity, port or 0 for any other) to whether it may connect; a miss is refused.

        When it returns, no connection is admitted by the old one any more, and every one that was is in
        :meth:`connections`. PROBE and TUNNEL need no entries.

        :param generation: from 1 on, any number that the caller can tell from the previous one.
        """
        raise NotImplementedError

    def policy(self, netns_cookie: int) -> tuple[int, dict[tuple[int, int], bool]] | None:
        """Generation and table that are in force; None when everything is refused because there is none."""
        raise NotImplementedError

    def set_peer(self, address: str, peer: Peer) -> None:
        """Who has an address. For an address of a pod of :meth:`add_pod` it is ignored: what was added there holds."""
        raise NotImplementedError

    def remove_peer(self, address: str) -> None:
        """Forget an address (ignored for those of :meth:`add_pod`)."""
        raise NotImplementedError

    def peers(self) -> dict[str, Peer]:
        """By address, those of :meth:`add_pod` too."""
        raise NotImplementedError

    def set_service(self, address: str, port: int, backends: Iterable[Backend], *, l7: bool = False) -> None:
        """Where connections to (service address, port) go; swapped at once for all of it. None refuses them."""
        raise NotImplementedError

    def remove_service(self, address: str, port: int) -> None:
        """Connections to it pass as to any unknown address."""
        raise NotImplementedError

    def services(self) -> dict[tuple[str, int], tuple[bool, list[Backend]]]:
        """(L7?, backends) by (service address, port)."""
        raise NotImplementedError

    def captured_fd(self) -> int:
        """A new read-only descriptor of the map ``captured`` to hand to a proxy; the caller's."""
        raise NotImplementedError

    # Connections and accounts

    def connections(self) -> list[Connection]:
        """Every open inbound connection of the pods (not loopback, not our own listeners')."""
        raise NotImplementedError

    def refused_now(self) -> list[Connection]:
        """Those that the policies of this moment refuse (judged in the kernel by the identity they were admitted with)."""
        raise NotImplementedError

    def destroy(self, connection: Connection, netns: int) -> bool:
        """Abort a connection at the server's end (both ends see a reset); False when it was gone already."""
        raise NotImplementedError

    def flows(self) -> dict[FlowKey, FlowCounters]:
        """The accounts, exact at the moment of the call, open connections included."""
        raise NotImplementedError

    def forget_flows(self, keys: Iterable[FlowKey]) -> None:
        """Drop accounts (of identities that nobody has any more); those with open connections stay."""
        raise NotImplementedError

    def pressure(self) -> dict[str, Pressure]:
        """By map."""
        raise NotImplementedError

    def events_fd(self) -> int:
        """Readable when there are events (for an event loop); stays ours."""
        raise NotImplementedError

    def read_events(self) -> list[Event]:
        """The events since the last call."""
        raise NotImplementedError
