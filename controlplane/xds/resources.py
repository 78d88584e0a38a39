"""A snapshot as xDS resources, with a digest of each. What is as in the snapshot before is taken from there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from envoy.config.listener.v3 import listener_components_pb2
from google.protobuf import any_pb2
from google.protobuf.message import Message

from controlplane.model.routing import Cluster, RouteTable
from controlplane.model.snapshot import Snapshot
from controlplane.xds.clusters import cluster, endpoints
from controlplane.xds.listeners import chain, chain_listener, listener
from controlplane.xds.routes import route_configuration
from controlplane.xds.types import Type, pack

_T = TypeVar("_T")
#: Listeners by chain are for clients that say so; all others get one listener with all chains.
BY_CHAIN = ""


class Packed(NamedTuple):
    """A resource ready to send, and its SHA-256."""

    any: any_pb2.Any
    digest: str


class Resources:
    """All resources of one snapshot, shared by all clients.

    ``before``: resources of an earlier snapshot. Where nothing of a type has changed, :meth:`of` returns the same mapping for
    both: to compare two is to compare their identities.
    """

    _endpoints: Mapping[str, Packed]
    _clusters: Mapping[str, Packed]
    _routes: Mapping[str, Packed]
    _by_chain: Mapping[str, Packed]

    def __init__(self, snapshot: Snapshot, before: Resources | None = None) -> None:
        self._snapshot = snapshot
        known: tuple[Mapping[str, Cluster], Mapping[str, RouteTable]] = (
            (before._snapshot.clusters, before._snapshot.tables) if before else ({}, {})
        )
        self._endpoints = _packed(
            snapshot.clusters, known[0], before._endpoints if before else {}, endpoints, lambda c: c
        )
        self._clusters = _packed(
            snapshot.clusters, known[0], before._clusters if before else {}, cluster, _without_endpoints
        )
        self._routes = _packed(
            snapshot.tables, known[1], before._routes if before else {}, route_configuration, lambda t: t
        )
        self._by_chain = _packed(
            snapshot.tables, known[1], before._by_chain if before else {}, chain_listener, _without_routes
        )
        self._whole: dict[str, Mapping[str, Packed]] = {}
        if before and before._by_chain is self._by_chain:
            self._whole = before._whole

    @property
    def version(self) -> str:
        """The snapshot's."""
        return self._snapshot.version

    def of(self, kind: Type, socket: str) -> Mapping[str, Packed]:
        """Resources of a type by name; ``socket`` is where the client's listener is to be, or BY_CHAIN."""
        match kind:
            case Type.CLUSTER:
                return self._clusters
            case Type.ENDPOINTS:
                return self._endpoints
            case Type.ROUTES:
                return self._routes
            case Type.LISTENER:
                return self._by_chain if socket == BY_CHAIN else self._listener(socket)

    def _listener(self, socket: str) -> Mapping[str, Packed]:
        if socket not in self._whole:
            made = listener(self._chains(), socket)
            self._whole[socket] = {made.name: _pack(made)} if made else {}
        return self._whole[socket]

    def _chains(self) -> Iterator[listener_components_pb2.FilterChain]:
        for table in self._snapshot.tables.values():
            yield chain(table)


def _packed(
    parts: Mapping[str, _T],
    known: Mapping[str, _T],
    before: Mapping[str, Packed],
    make: Callable[[_T], Message],
    matters: Callable[[_T], Any],
) -> Mapping[str, Packed]:
    """``before`` was made from ``known``; ``matters`` is that of a part from which a resource is made."""
    result: dict[str, Packed] = {}
    same = len(parts) == len(before)
    for name, part in parts.items():
        old = known.get(name)
        if name in before and old is not None and (old is part or matters(old) == matters(part)):
            result[name] = before[name]
        else:
            result[name] = _pack(make(part))
            same = False
    return before if same else result


def _without_endpoints(c: Cluster) -> Any:
    return (c.host, c.service, c.namespace, c.port, c.subset, c.balancing, c.http2)


def _without_routes(table: RouteTable) -> Any:
    return (table.host, table.addresses, table.port)


def _pack(message: Message) -> Packed:
    packed = pack(message)
    return Packed(packed, hashlib.sha256(packed.value).hexdigest())
