"""Who is connected, what they have in force and what they refused: for ``/debug/clients``, the metrics and the status.

Also where a stream is told that its caller may stay no longer.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge

from controlplane.credentials import Caller


class CredentialEnded(Exception):
    """The stream's caller may stay no longer; the text says why."""


@dataclass
class Client:
    """One stream. For xDS clients the versions are of each type; for agents and node proxies the snapshot's."""

    id: int
    caller: Caller
    node: str
    component: str
    peer: str
    admin: str = ""  #: where the client serves its own metrics, ``ADDRESS:PORT``
    since: float = field(default_factory=time.time)
    version_sent: str = ""
    version_acked: str = ""
    types: dict[str, dict[str, str]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)  #: what the client refused: resource key to reason
    nacks: int = 0

    def __post_init__(self) -> None:
        # No fields: they are on no page.
        self._pending = ""
        self._ended = ""
        self._wake: asyncio.Event | None = None

    @property
    def pending(self) -> str:
        """The first version that was sent since the last acknowledgement; empty if nothing is on its way."""
        return self._pending

    def sent(self, version: str) -> None:
        """An update to this snapshot, or a part of one, is on its way."""
        self.version_sent = version
        self._pending = self._pending or version

    def answered(self, version: str) -> None:
        """The client has answered for all that it was sent, up to this snapshot."""
        self.version_acked, self._pending = version, ""

    @contextmanager
    def woken_by(self, event: asyncio.Event) -> Iterator[None]:
        """Set ``event`` when the stream has to end, for as long as the context lasts."""
        self._wake = event
        try:
            yield
        finally:
            self._wake = None

    def end(self, reason: str) -> None:
        """Have the stream end; its loop finds out by :meth:`check`."""
        self._ended = reason
        if self._wake is not None:
            self._wake.set()

    def check(self) -> None:
        """:raises CredentialEnded: the stream has to end."""
        if self._ended:
            raise CredentialEnded(self._ended)


class Clients:
    """All streams of this controller."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ids = itertools.count(1)
        self._all: dict[int, Client] = {}
        self._connected = Gauge(
            "mycel_controlplane_clients", "Clients that are connected.", ["component"], registry=registry
        )
        self._pushes = Counter(
            "mycel_controlplane_pushes", "Updates sent to clients.", ["component", "type"], registry=registry
        )
        self._nacks = Counter(
            "mycel_controlplane_nacks",
            "Updates that clients refused.",
            ["component", "type"],
            registry=registry,
        )

    @contextmanager
    def connected(self, caller: Caller, component: str, peer: str, admin: str = "") -> Iterator[Client]:
        """A client's entry, for as long as its stream lasts."""
        client = Client(next(self._ids), caller, caller.node, component, peer, admin)
        self._all[client.id] = client
        self._connected.labels(component).inc()
        try:
            yield client
        finally:
            del self._all[client.id]
            self._connected.labels(component).dec()

    def pushed(self, client: Client, kind: str) -> None:
        self._pushes.labels(client.component, kind).inc()

    def refused(self, client: Client, kind: str) -> None:
        client.nacks += 1
        self._nacks.labels(client.component, kind).inc()

    def end(self, ended: Callable[[Caller], str]) -> None:
        """End every stream for whose caller ``ended`` has a reason."""
        for client in self._all.values():
            reason = ended(client.caller)
            if reason:
                client.end(reason)

    def __iter__(self) -> Iterator[Client]:
        return iter(sorted(self._all.values(), key=lambda c: (c.node, c.component, c.id)))
