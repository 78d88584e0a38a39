"""The snapshot: everything that is in force, immutable, with a version that follows from its content alone."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from controlplane.api import (
    Authorization,
    MeshConfig,
    NetworkPolicy,
    Resource,
    Service,
    Workload,
    resource_key,
)
from controlplane.model.findings import Finding, in_order
from controlplane.model.routing import Cluster, RouteTable

_T = TypeVar("_T")
_encoder = msgspec.msgpack.Encoder(order="sorted")
_BUCKETS = 256


class SnapshotError(Exception):
    """The parts do not fit together: the compiler is wrong, and nothing of this may be served."""


@dataclass(frozen=True)
class Snapshot:
    """What controllers serve. Made by an :class:`Assembly` only, which checks it.

    Two snapshots of equal resources, clusters and tables have equal versions; findings are told to people, not served, and
    so are no part of the version. What two successive snapshots have in common are the same Python objects.
    """

    version: str
    resources: Mapping[str, Resource]  #: by :func:`controlplane.api.resource_key`
    clusters: Mapping[str, Cluster]
    tables: Mapping[str, RouteTable]
    workloads: Mapping[str, Workload] = field(repr=False)  #: by UID
    unordered: tuple[Finding, ...] = field(default=(), compare=False, repr=False)

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """The worst first."""
        return in_order(self.unordered)

    @cached_property
    def services(self) -> Mapping[tuple[str, str], Service]:
        """By namespace and name."""
        return MappingProxyType(
            {(r.namespace, r.name): r for r in self.resources.values() if isinstance(r, Service)}
        )


class Change(NamedTuple, Generic[_T]):
    """One part before and now; None where there is none."""

    before: _T | None
    now: _T | None


@dataclass
class Changes:
    """What leads from one snapshot to the next."""

    resources: list[Change[Resource]] = field(default_factory=list)
    clusters: list[Change[Cluster]] = field(default_factory=list)
    tables: list[Change[RouteTable]] = field(default_factory=list)


class Assembly:
    """The parts of the newest snapshot, kept so that the next one costs what has changed and not what there is.

    The version is a Merkle tree of two levels: parts fall into buckets by the CRC of their names, and each bucket's digest is of
    the sorted digests in it. So it follows from the content, on every controller and whatever came before.
    """

    def __init__(self) -> None:
        self._resources: dict[str, Resource] = {}
        self._clusters: dict[str, Cluster] = {}
        self._tables: dict[str, RouteTable] = {}
        self._workloads: dict[str, Workload] = {}
        self._digests: list[dict[str, bytes]] = [{} for _ in range(_BUCKETS)]
        self._buckets: list[bytes] = [b""] * _BUCKETS

    def apply(self, changes: Changes, findings: tuple[Finding, ...] = ()) -> Snapshot:
        """The snapshot after these changes.

        :raises SnapshotError: two parts of one name, a workload with a policy that is not there, no mesh configuration. The
            assembly is spoilt then.
        """
        touched: set[int] = set()
        self._replace(self._resources, "resource", changes.resources, resource_key, touched)
        self._replace(self._clusters, "cluster", changes.clusters, lambda c: c.name, touched)
        self._replace(self._tables, "table", changes.tables, lambda t: t.name, touched)
        workloads = [Change(_workload(c.before), _workload(c.now)) for c in changes.resources]
        for change in workloads:
            if change.before:
                self._workloads.pop(change.before.uid, None)
        for change in workloads:
            if change.now:
                self._workloads[change.now.uid] = change.now
        for bucket in touched:
            parts = b"".join(sorted(self._digests[bucket].values()))
            self._buckets[bucket] = hashlib.sha256(parts).digest() if parts else b""
        self._check(changes)
        return Snapshot(
            hashlib.sha256(b"".join(b"%d:" % len(b) + b for b in self._buckets)).hexdigest(),
            MappingProxyType(self._resources.copy()),
            MappingProxyType(self._clusters.copy()),
            MappingProxyType(self._tables.copy()),
            MappingProxyType(self._workloads.copy()),
            findings,
        )

    def _replace(
        self, parts: dict[str, _T], kind: str, changes: list[Change[_T]], name_of: Any, touched: set[int]
    ) -> None:
        added = False
        gone = {name_of(c.before) for c in changes if c.before is not None}
        names = set()
        for change in changes:
            if change.now is None:
                continue
            name = name_of(change.now)
            if name in names or (name in parts and name not in gone):
                raise SnapshotError(f"{name} stands twice in the snapshot")
            names.add(name)
            added |= name not in parts
            parts[name] = change.now
            self._digest(kind, name, change.now, touched)
        for name in gone - names:
            if name in parts:
                del parts[name]
                self._digest(kind, name, None, touched)
        if added:
            ordered = sorted(parts.items())
            parts.clear()
            parts.update(ordered)

    def _digest(self, kind: str, name: str, part: Any, touched: set[int]) -> None:
        key = f"{kind}/{name}"
        bucket = zlib.crc32(key.encode()) % _BUCKETS
        touched.add(bucket)
        if part is None:
            del self._digests[bucket][key]
        else:
            self._digests[bucket][key] = hashlib.sha256(_encoder.encode([key, part])).digest()

    def _check(self, changes: Changes) -> None:
        resources = self._resources
        if not isinstance(resources.get("mesh"), MeshConfig):
            raise SnapshotError("no mesh configuration in the snapshot")
        policies_gone = any(
            isinstance(c.before, Authorization | NetworkPolicy) and c.now is None for c in changes.resources
        )
        suspects: Iterable[Resource | None] = (
            resources.values() if policies_gone else (c.now for c in changes.resources)
        )
        for suspect in suspects:
            if isinstance(suspect, Workload):
                named = [f"authorization/{p}" for p in suspect.policies]
                named += [f"network/{p}" for p in suspect.network_policies]
                for policy in named:
                    if policy not in resources:
                        key = resource_key(suspect)
                        raise SnapshotError(f"{key} has {policy}, which is not in the snapshot")
        self._check_l7(changes)

    def _check_l7(self, changes: Changes) -> None:
        """A port with the flag and no table would be captured and then answered by nobody, and the reverse be by-passed."""
        concerned: set[str] = set()
        for service in _each(changes.resources):
            if isinstance(service, Service):
                concerned |= _l7_tables(service)
        for table in _each(changes.tables):
            concerned.add(table.name)
        flagged: set[str] = set()
        for name in concerned:
            host = name.rpartition(":")[0]
            service_name, _, rest = host.partition(".")
            found = self._resources.get(f"service/{rest.partition('.')[0]}/{service_name}")
            if isinstance(found, Service) and name in _l7_tables(found):
                flagged.add(name)
        differing = flagged ^ (concerned & self._tables.keys())
        if differing:
            raise SnapshotError(f"L7 ports and route tables differ: {sorted(differing)}")


def build(
    resources: Iterable[Resource],
    clusters: Iterable[Cluster],
    tables: Iterable[RouteTable],
    findings: tuple[Finding, ...] = (),
) -> Snapshot:
    """A snapshot from nothing.

    :raises SnapshotError: as :meth:`Assembly.apply`.
    """
    return Assembly().apply(
        Changes(
            [Change(None, r) for r in resources],
            [Change(None, c) for c in clusters],
            [Change(None, t) for t in tables],
        ),
        findings,
    )


def _workload(resource: Resource | None) -> Workload | None:
    return resource if isinstance(resource, Workload) else None


def _each(changes: Iterable[Change[_T]]) -> Iterator[_T]:
    for change in changes:
        if change.before is not None:
            yield change.before
        if change.now is not None:
            yield change.now


def _l7_tables(service: Service) -> set[str]:
    return {f"{service.host}:{p.port}" for p in service.ports if p.l7}
