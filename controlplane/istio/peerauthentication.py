"""PeerAuthentication: which workloads, and which of their ports, refuse plain text.

Precedence is Istio's: workload, namespace, mesh (root namespace); the oldest of several on one level; UNSET inherits. A
policy with a selector in the root namespace has no effect, as in Istio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from controlplane.api import MtlsMode
from controlplane.istio import GROUP_SECURITY
from controlplane.model.findings import Findings
from controlplane.model.graph import Graph
from controlplane.model.kubernetes import Pod, selects
from controlplane.model.store import rows
from controlplane.model.world import store
from controlplane.source import Object

_UNSET = "UNSET"


@dataclass(frozen=True, slots=True)
class Mtls:
    """A workload's mode, and the ports that differ."""

    mode: MtlsMode = MtlsMode.PERMISSIVE
    ports: tuple[tuple[int, MtlsMode], ...] = ()


class _Policy(NamedTuple):
    selector: Mapping[str, str]
    mode: str
    ports: tuple[tuple[int, str], ...]


class Level(NamedTuple):
    """The policies of one namespace: those with a selector, the oldest first, and the one without."""

    workloads: tuple[_Policy, ...]
    own: _Policy | None


def peer_authentications(g: Graph, namespace: str) -> Level:
    """A namespace's policies; the root namespace's are the mesh's."""
    root = namespace == g.settings.root_namespace
    first: Object | None = None
    workloads = []
    for policy in rows(store(g).by_namespace, g, (GROUP_SECURITY, "PeerAuthentication", namespace)):
        _note_disable(policy, g.findings)
        if _selector(policy) and root:
            text = "a selector in the root namespace has no effect"
            g.findings.warning(policy, "spec.selector", text, "move it to the namespace")
        elif _selector(policy):
            workloads.append(_read(policy))
        elif first is None:
            first = policy
        else:
            level = "the mesh" if root else f"namespace {namespace}"
            text = f"{first.key} is older and is the one for {level}"
            g.findings.warning(policy, "", text, "remove one of them")
    return Level(tuple(workloads), _read(first) if first else None)


def mtls_of(g: Graph, pod: Pod) -> Mtls:
    """What holds for a workload."""
    level = g.get(peer_authentications, pod.namespace)
    mesh = g.get(peer_authentications, g.settings.root_namespace).own
    own = next((p for p in level.workloads if selects(p.selector, pod.labels)), None)
    mode = next((p.mode for p in (own, level.own, mesh) if p and p.mode != _UNSET), _UNSET)
    ports = []
    for port, written in own.ports if own else ():
        port_mode = _mode(written, mode)
        if port_mode is not _mode(mode):
            ports.append((port, port_mode))
    return Mtls(_mode(mode), tuple(ports))


def _read(policy: Object) -> _Policy:
    ports = (policy.spec.get("portLevelMtls") or {}).items()
    return _Policy(
        _selector(policy),
        (policy.spec.get("mtls") or {}).get("mode") or _UNSET,
        tuple(sorted((int(port), (mtls or {}).get("mode") or _UNSET) for port, mtls in ports)),
    )


def _mode(mode: str, inherited: str = _UNSET) -> MtlsMode:
    if mode == _UNSET:
        mode = inherited
    # UNSET everywhere is PERMISSIVE; DISABLE is served so too: HBONE is always offered.
    return MtlsMode.STRICT if mode == "STRICT" else MtlsMode.PERMISSIVE


def _selector(policy: Object) -> Mapping[str, str]:
    labels: Mapping[str, str] = (policy.spec.get("selector") or {}).get("matchLabels") or {}
    return labels


def _note_disable(policy: Object, findings: Findings) -> None:
    text = "DISABLE is served as PERMISSIVE: between enrolled workloads on two nodes traffic stays encrypted"
    if (policy.spec.get("mtls") or {}).get("mode") == "DISABLE":
        findings.info(policy, "spec.mtls.mode", text)
    for port, mtls in sorted((policy.spec.get("portLevelMtls") or {}).items()):
        if (mtls or {}).get("mode") == "DISABLE":
            findings.info(policy, f"spec.portLevelMtls.{port}.mode", text)
