"""What is wrong with a Kubernetes object beyond its schema."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any

from common import spiffe
from controlplane.model import networkpolicy

#: Which of a node's addresses are its own: what its other ones (names) are, nobody dials.
NODE_ADDRESSES = ("InternalIP", "ExternalIP")
Problem = tuple[str, str]


def validate(manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """(field, reason) of everything wrong with one object that its schema accepts."""
    if manifest["apiVersion"] == "discovery.k8s.io/v1" and manifest.get("addressType") != "FQDN":
        for i, endpoint in enumerate(manifest.get("endpoints") or ()):
            for j, address in enumerate(endpoint.get("addresses") or ()):
                yield from _address(address, f"endpoints[{i}].addresses[{j}]")
    if manifest["apiVersion"] == "networking.k8s.io/v1" and manifest["kind"] == "NetworkPolicy":
        yield from networkpolicy.validate(manifest.get("spec") or {})
    if manifest["apiVersion"] != "v1":
        return
    spec = manifest.get("spec") or {}
    if manifest["kind"] == "Pod":
        status = manifest.get("status") or {}
        yield from _address(status.get("podIP"), "status.podIP")
        for i, item in enumerate(status.get("podIPs") or ()):
            yield from _address(item["ip"], f"status.podIPs[{i}].ip")
        try:
            spiffe.join_segments((spec.get("serviceAccountName") or "default",))
        except spiffe.SpiffeError as e:
            yield "spec.serviceAccountName", str(e)
    elif manifest["kind"] == "Service":
        yield from _service(spec)
        balancer = (manifest.get("status") or {}).get("loadBalancer") or {}
        for i, item in enumerate(balancer.get("ingress") or ()):
            yield from _address(item.get("ip"), f"status.loadBalancer.ingress[{i}].ip")
    elif manifest["kind"] == "Node":
        for i, item in enumerate((manifest.get("status") or {}).get("addresses") or ()):
            if item["type"] in NODE_ADDRESSES:
                yield from _address(item["address"], f"status.addresses[{i}].address")


def _service(spec: Mapping[str, Any]) -> Iterator[Problem]:
    for path, address in [("spec.clusterIP", spec.get("clusterIP"))] + [
        (f"spec.clusterIPs[{i}]", a) for i, a in enumerate(spec.get("clusterIPs") or ())
    ]:
        if address != "None":
            yield from _address(address, path)
    for i, address in enumerate(spec.get("externalIPs") or ()):
        yield from _address(address, f"spec.externalIPs[{i}]")
    ports = spec.get("ports") or ()
    seen: set[tuple[int, str]] = set()
    for i, port in enumerate(ports):
        key = (port["port"], port.get("protocol") or "TCP")
        if key in seen:
            yield f"spec.ports[{i}]", f"{key[1]} port {key[0]} stands twice"
        seen.add(key)
        if len(ports) > 1 and not port.get("name"):
            yield f"spec.ports[{i}].name", "required where there are several ports"


def _address(text: str | None, path: str) -> Iterator[Problem]:
    if text:
        try:
            ipaddress.ip_address(text)
        except ValueError:
            yield path, f"{text!r} is no IP address"
