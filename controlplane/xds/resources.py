"""A snapshot as xDS resources, with a digest of each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

from google.protobuf import any_pb2
from google.protobuf.message import Message

from controlplane.model.snapshot import Snapshot
from controlplane.xds.clusters import cluster, endpoints
from controlplane.xds.listeners import NAME, listener
from controlplane.xds.routes import route_configuration
from controlplane.xds.types import Type, pack


class Packed(NamedTuple):
    """A resource ready to send, and its SHA-256."""

    any: any_pb2.Any
    digest: str


class Resources:
    """All resources of one snapshot. Built when first asked for, shared by all clients."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._listeners: dict[str, Mapping[str, Packed]] = {}

    @property
    def version(self) -> str:
        """The snapshot's."""
        return self._snapshot.version

    def of(self, kind: Type, socket: str) -> Mapping[str, Packed]:
        """Resources of a type by name; ``socket`` is where the client's listener is to be."""
        match kind:
            case Type.CLUSTER:
                return self._clusters
            case Type.ENDPOINTS:
                return self._endpoints
            case Type.ROUTES:
                return self._routes
            case Type.LISTENER:
                if socket not in self._listeners:
                    made = listener(self._snapshot.tables.values(), socket)
                    self._listeners[socket] = {NAME: _packed(made)} if made else {}
                return self._listeners[socket]

    @cached_property
    def _clusters(self) -> Mapping[str, Packed]:
        return {name: _packed(cluster(c)) for name, c in self._snapshot.clusters.items()}

    @cached_property
    def _endpoints(self) -> Mapping[str, Packed]:
        return {name: _packed(endpoints(c)) for name, c in self._snapshot.clusters.items()}

    @cached_property
    def _routes(self) -> Mapping[str, Packed]:
        return {name: _packed(route_configuration(t)) for name, t in self._snapshot.tables.items()}


def _packed(message: Message) -> Packed:
    packed = pack(message)
    return Packed(packed, hashlib.sha256(packed.value).hexdigest())
