"""Istio's host names: short names, wildcards, which of several that match is the closest, and who may speak of a service."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from controlplane.model.findings import Findings
from controlplane.model.graph import Graph
from controlplane.model.kubernetes import CLUSTER_DOMAIN, host_of, service_of
from controlplane.model.world import store
from controlplane.source import Key, Object


def resolve(host: str, namespace: str) -> str:
    """A short name (no dot) is a service of the object's own namespace; everything else is complete."""
    if "." in host or "*" in host or not host:
        return host.lower()
    return f"{host}.{namespace}.svc.{CLUSTER_DOMAIN}".lower()


def closeness(pattern: str, host: str) -> int:
    """How closely a resolved pattern names a host; 0 if it does not match. Exact beats any wildcard, longer beats shorter."""
    if pattern == host:
        return 1 << 16
    if pattern == "*":
        return 1
    if pattern.startswith("*") and host.endswith(pattern[1:]) and host != pattern[1:]:
        return 1 + len(pattern)
    return 0


class Hosts(NamedTuple):
    """Which objects speak of which hosts: by exact host, and by pattern; the oldest first."""

    exact: dict[str, tuple[Key, ...]]
    patterns: tuple[tuple[str, Key], ...]

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, Key]]) -> Hosts:
        """From (resolved host, object), the oldest first."""
        exact: dict[str, tuple[Key, ...]] = {}
        patterns = []
        for host, key in pairs:
            if host.startswith("*"):
                patterns.append((host, key))
            else:
                exact[host] = (*exact.get(host, ()), key)
        return cls(exact, tuple(patterns))

    def matching(self, host: str) -> Iterator[tuple[int, Key]]:
        """(closeness, object) of all that speak of a host."""
        for key in self.exact.get(host, ()):
            yield closeness(host, host), key
        for pattern, key in self.patterns:
            close = closeness(pattern, host)
            if close:
                yield close, key


def services_matching(g: Graph, pattern: str) -> list[Key]:
    """The services that a resolved host or pattern speaks of."""
    if not pattern.startswith("*"):
        key = service_of(pattern)
        return [key] if key and g.read(store(g).objects, key) is not None else []
    return [k for k in g.read(store(g).by_kind, ("", "Service")) if closeness(pattern, host_of(k))]


def reaches(about: Object, namespace: str) -> bool:
    """True if a rule may speak of a namespace's services: it is exported to all callers, or is their owner's own.

    Callers cannot be told apart yet. What a namespace keeps to itself (``exportTo``) must not route everybody's calls to
    another one's services.
    """
    exported = about.spec.get("exportTo")
    return not exported or "*" in exported or about.key.namespace == namespace


def note_export(about: Object, findings: Findings) -> None:
    """Say what ``exportTo`` does."""
    exported = about.spec.get("exportTo")
    if exported and "*" not in exported:
        text = (
            "exportTo is not in force yet: holds for callers everywhere where it is about services of its own namespace,"
            " and for nobody where it is about others'"
        )
        findings.warning(about, "spec.exportTo", text, "export it to *, or keep it beside the service")
