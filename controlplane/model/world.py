"""All objects of one compilation, read once and indexed: what dialects look things up in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from controlplane.model.kubernetes import Pod, ServiceView, read_pod, read_service
from controlplane.source import Key, Object


@dataclass(frozen=True)
class Settings:
    """What the process was told, not the objects. ``roots`` is a PEM bundle."""

    trust_domain: str = "cluster.local"
    roots: str = ""
    root_namespace: str = "istio-system"


@dataclass(frozen=True)
class World:
    settings: Settings
    pods: tuple[Pod, ...]  #: by UID
    services: Mapping[str, ServiceView]  #: by host
    #: one of two pods that claim the same UID: (kept, left out)
    twins: tuple[tuple[Pod, Pod], ...]
    #: services that claim an address that an older one has: (older, younger, address)
    address_twins: tuple[tuple[ServiceView, ServiceView, str], ...]
    _by_kind: Mapping[tuple[str, str], tuple[Object, ...]]

    def of_kind(self, group: str, kind: str) -> tuple[Object, ...]:
        """All objects of a kind, the oldest first."""
        return self._by_kind.get((group, kind), ())

    def kinds(self) -> Iterable[tuple[str, str]]:
        return self._by_kind.keys()


def read(objects: Mapping[Key, Object], settings: Settings) -> World:
    """Index the objects. Their order means nothing."""
    by_kind: dict[tuple[str, str], list[Object]] = {}
    for o in sorted(objects.values(), key=lambda o: o.age):
        by_kind.setdefault((o.key.group, o.key.kind), []).append(o)
    namespaces = {o.key.name: o for o in by_kind.get(("", "Namespace"), ())}
    pods: dict[str, Pod] = {}
    twins = []
    for o in by_kind.get(("", "Pod"), ()):
        pod = read_pod(o, namespaces.get(o.key.namespace))
        if pod is None:
            continue
        if pod.uid in pods:
            twins.append((pods[pod.uid], pod))
            continue
        pods[pod.uid] = pod
    by_label: dict[tuple[str, str, str], list[Pod]] = {}
    for pod in pods.values():
        for name, value in pod.labels.items():
            by_label.setdefault((pod.namespace, name, value), []).append(pod)
    services: list[ServiceView] = []
    address_twins = []
    owners: dict[str, ServiceView] = {}
    for o in by_kind.get(("", "Service"), ()):
        selector = o.spec.get("selector") or {}
        # Only the pods with the rarest pair of the selector are compared: not every service with every pod.
        having = [by_label.get((o.key.namespace, *pair), []) for pair in selector.items()]
        service = read_service(o, min(having, key=len, default=[]))
        taken = [a for a in service.addresses if a in owners]
        address_twins += [(owners[a], service, a) for a in taken]
        service = replace(service, addresses=tuple(a for a in service.addresses if a not in taken))
        owners |= dict.fromkeys(service.addresses, service)
        services.append(service)
    return World(
        settings,
        tuple(sorted(pods.values(), key=lambda p: p.uid)),
        {s.host: s for s in sorted(services, key=lambda s: s.host)},
        tuple(twins),
        tuple(address_twins),
        {k: tuple(v) for k, v in by_kind.items()},
    )
