"""Istio's host names: short names, wildcards, which of several that match is the closest, and who may speak of a service."""

from __future__ import annotations

from controlplane.model.findings import Findings
from controlplane.model.kubernetes import CLUSTER_DOMAIN
from controlplane.source import Object


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
