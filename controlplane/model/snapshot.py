"""The snapshot: everything that is in force, immutable, with a version that follows from its content alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TypeVar

import msgspec

from controlplane.api import Authorization, MeshConfig, Resource, Service, Workload, resource_key
from controlplane.model.findings import Finding
from controlplane.model.routing import Cluster, RouteTable

_T = TypeVar("_T")
_encoder = msgspec.msgpack.Encoder(order="sorted")


class SnapshotError(Exception):
    """The parts do not fit together: the compiler is wrong, and nothing of this may be served."""


@dataclass(frozen=True)
class Snapshot:
    """What controllers serve. Made by :func:`build` only, which checks it.

    Two snapshots of equal resources, clusters and tables have equal versions; findings are told to people, not served, and
    so are no part of the version.
    """

    version: str
    resources: Mapping[str, Resource]  #: by :func:`controlplane.api.resource_key`
    clusters: Mapping[str, Cluster]
    tables: Mapping[str, RouteTable]
    findings: tuple[Finding, ...] = ()

    @cached_property
    def workloads(self) -> Mapping[str, Workload]:
        """By UID."""
        return MappingProxyType({r.uid: r for r in self.resources.values() if isinstance(r, Workload)})

    @cached_property
    def services(self) -> Mapping[tuple[str, str], Service]:
        """By namespace and name."""
        return MappingProxyType(
            {(r.namespace, r.name): r for r in self.resources.values() if isinstance(r, Service)}
        )


def build(
    resources: Iterable[Resource],
    clusters: Iterable[Cluster],
    tables: Iterable[RouteTable],
    findings: tuple[Finding, ...] = (),
) -> Snapshot:
    """Put a snapshot together.

    :raises SnapshotError: two parts of one name, a workload with a policy that is not there, no mesh configuration.
    """
    by_key = _unique((resource_key(r), r) for r in resources)
    by_cluster = _unique((c.name, c) for c in clusters)
    by_table = _unique((t.name, t) for t in tables)
    _check(by_key, by_table)
    content = [list(by_key.values()), list(by_cluster.values()), list(by_table.values())]
    version = hashlib.sha256(_encoder.encode(content)).hexdigest()
    return Snapshot(
        version, MappingProxyType(by_key), MappingProxyType(by_cluster), MappingProxyType(by_table), findings
    )


def _unique(pairs: Iterable[tuple[str, _T]]) -> dict[str, _T]:
    result: dict[str, _T] = {}
    for name, value in sorted(pairs, key=lambda p: p[0]):
        if name in result:
            raise SnapshotError(f"{name} stands twice in the snapshot")
        result[name] = value
    return result


def _check(resources: Mapping[str, Resource], tables: Mapping[str, RouteTable]) -> None:
    if not isinstance(resources.get("mesh"), MeshConfig):
        raise SnapshotError("no mesh configuration in the snapshot")
    l7 = set()
    for key, resource in resources.items():
        if isinstance(resource, Workload):
            for policy in resource.policies:
                if not isinstance(resources.get(f"authorization/{policy}"), Authorization):
                    raise SnapshotError(f"{key} has policy {policy}, which is not in the snapshot")
        elif isinstance(resource, Service):
            l7 |= {f"{resource.host}:{p.port}" for p in resource.ports if p.l7}
    if l7 != set(tables):
        # A port with the flag and no table would be captured and then answered by nobody, and the reverse be by-passed.
        raise SnapshotError(f"L7 ports and route tables differ: {sorted(l7 ^ set(tables))}")
