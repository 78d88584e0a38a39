"""Who is connected, what they have in force and what they refused: for ``/debug/clients`` and the metrics."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge


@dataclass
class Client:
    """One stream. For xDS clients the versions are of each type; for agents and node proxies the snapshot's."""

    id: int
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
    def connected(self, node: str, component: str, peer: str, admin: str = "") -> Iterator[Client]:
        """A client's entry, for as long as its stream lasts."""
        client = Client(next(self._ids), node, component, peer, admin)
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

    def __iter__(self) -> Iterator[Client]:
        return iter(sorted(self._all.values(), key=lambda c: (c.node, c.component, c.id)))
