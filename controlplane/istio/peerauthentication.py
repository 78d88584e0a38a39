"""PeerAuthentication: which workloads, and which of their ports, refuse plain text.

Precedence is Istio's: workload, namespace, mesh (root namespace); the oldest of several on one level; UNSET inherits. A
policy with a selector in the root namespace has no effect, as in Istio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from controlplane.api import MtlsMode
from controlplane.istio import GROUP_SECURITY
from controlplane.model.findings import Findings
from controlplane.model.kubernetes import Pod, selects
from controlplane.model.world import World
from controlplane.source import Object

_UNSET = "UNSET"


@dataclass(frozen=True, slots=True)
class Mtls:
    """A workload's mode, and the ports that differ."""

    mode: MtlsMode = MtlsMode.PERMISSIVE
    ports: tuple[tuple[int, MtlsMode], ...] = ()


class PeerAuthentications:
    """All policies of a world; asks for one workload at a time."""

    def __init__(self, world: World, findings: Findings) -> None:
        self._mesh: Object | None = None
        self._namespaces: dict[str, Object] = {}
        self._workloads: dict[str, list[Object]] = {}
        for policy in world.of_kind(GROUP_SECURITY, "PeerAuthentication"):
            namespace = policy.key.namespace
            _note_disable(policy, findings)
            if _selector(policy):
                if namespace == world.settings.root_namespace:
                    findings.warning(
                        policy,
                        "spec.selector",
                        "a selector in the root namespace has no effect",
                        "move it to the namespace",
                    )
                else:
                    self._workloads.setdefault(namespace, []).append(policy)
            elif namespace == world.settings.root_namespace:
                self._mesh = self._first(self._mesh, policy, "the mesh", findings)
            else:
                first = self._first(
                    self._namespaces.get(namespace), policy, f"namespace {namespace}", findings
                )
                self._namespaces[namespace] = first

    @staticmethod
    def _first(known: Object | None, policy: Object, level: str, findings: Findings) -> Object:
        if known is None:
            return policy
        findings.warning(policy, "", f"{known.key} is older and is the one for {level}", "remove one of them")
        return known

    def of(self, pod: Pod) -> Mtls:
        """What holds for a workload."""
        own = next(
            (p for p in self._workloads.get(pod.namespace, ()) if selects(_selector(p), pod.labels)), None
        )
        mode = _UNSET
        for policy in (own, self._namespaces.get(pod.namespace), self._mesh):
            if policy is not None and mode == _UNSET:
                mode = (policy.spec.get("mtls") or {}).get("mode") or _UNSET
        ports = []
        for port, mtls in sorted(
            ((own.spec if own else {}).get("portLevelMtls") or {}).items(), key=lambda p: int(p[0])
        ):
            port_mode = _mode((mtls or {}).get("mode") or _UNSET, mode)
            if port_mode is not _mode(mode):
                ports.append((int(port), port_mode))
        return Mtls(_mode(mode), tuple(ports))


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
