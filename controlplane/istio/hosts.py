"""Istio's host names: short names, wildcards, and which of several that match is the closest."""

from __future__ import annotations

from controlplane.model.kubernetes import CLUSTER_DOMAIN


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
