"""Which pods are in the mesh: what labels and annotations ask for, in every dialect, and what speaks against it.

Four ways of asking, each with its own way of opting out:

- ``mycel.io/mesh: enabled`` on namespace or pod; ``disabled`` on a pod keeps it out whatever else is said, on a namespace it
  keeps those pods out that do not ask themselves (by this label or the next);
- ``istio.io/dataplane-mode: ambient`` on namespace or pod; ``none`` on a pod keeps it out whatever else is said;
- Istio's injection: ``istio-injection`` and ``istio.io/rev`` on a namespace, ``sidecar.istio.io/inject`` and ``istio.io/rev``
  on a pod, with the precedence of Istio's webhooks. Mycel is the revisions ``default`` and ``mycel``; any other is another
  control plane's;
- Linkerd's annotation ``linkerd.io/inject`` on namespace or pod: ``enabled`` and ``ingress`` ask, ``disabled`` opts out.

Nothing is ever injected. Pods with a sidecar already, with the node's network, and of namespaces that are outside
(kube-system, the mesh's own) stay out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

from controlplane.source import Object

#: Revisions of Istio's control plane that this mesh answers to.
REVISIONS = ("default", "mycel")
_SIDECARS = ("istio-proxy", "linkerd-proxy")
_SIDECAR_ANNOTATION = "sidecar.istio.io/status"

Labels = Mapping[str, str]


class Asked(NamedTuple):
    """What a namespace, or a pod, says about the mesh."""

    labels: Labels = MappingProxyType({})
    annotations: Labels = MappingProxyType({})


class Enrolment(NamedTuple):
    """``refused`` says why a pod stays out that asks for the mesh; ``action`` what to do, if somebody should."""

    enrolled: bool
    refused: str = ""
    action: str = ""


def enrolment(pod: Object, namespace: Asked, outside: Collection[str]) -> Enrolment:
    """Whether a pod is in the mesh. ``outside`` are namespaces of which none ever is."""
    own = Asked(pod.labels, pod.annotations)
    if pod.key.namespace in outside:
        # What the namespace asks for is said of the namespace, once.
        if asks(own, Asked()):
            return Enrolment(False, f"namespace {pod.key.namespace} is always outside of the mesh")
        return Enrolment(False)
    if not asks(own, namespace):
        return Enrolment(False)
    if pod.spec.get("hostNetwork"):
        return Enrolment(False, "its network is the node's (hostNetwork): it stays outside of the mesh")
    found = sidecar(pod)
    if found:
        return Enrolment(
            False,
            f"it has a sidecar already ({found}): it stays outside of the mesh",
            "remove what injects it, then restart the pod",
        )
    return Enrolment(True)


def asks(own: Asked, namespace: Asked) -> bool:
    """True if labels and annotations ask for the mesh, whatever the pod is otherwise."""
    mesh, mode = own.labels.get("mycel.io/mesh"), own.labels.get("istio.io/dataplane-mode")
    if mesh == "disabled" or mode == "none":
        return False
    if mesh == "enabled" or mode == "ambient":
        return True
    if namespace.labels.get("mycel.io/mesh") == "disabled":
        return False
    return (
        namespace.labels.get("mycel.io/mesh") == "enabled"
        or namespace.labels.get("istio.io/dataplane-mode") == "ambient"
        or _istio_injects(own, namespace)
        or _linkerd_injects(own, namespace)
    )


def foreign_revision(namespace: Asked) -> str:
    """The revision of another control plane that a namespace's pods are injected by; empty if there is none."""
    revision = namespace.labels.get("istio.io/rev", "")
    return "" if revision in REVISIONS or asks(Asked(), namespace) else revision


def sidecar(pod: Object) -> str:
    """Which sidecar a pod has, as words; empty if it has none. Native ones are init containers."""
    for part in ("containers", "initContainers"):
        for container in pod.spec.get(part) or ():
            if container.get("name") in _SIDECARS:
                return f"container {container['name']}"
    return f"annotation {_SIDECAR_ANNOTATION}" if _SIDECAR_ANNOTATION in pod.annotations else ""


def _istio_injects(own: Asked, namespace: Asked) -> bool:
    # The label goes before the annotation of the same name, which is the older way.
    inject = own.labels.get("sidecar.istio.io/inject") or own.annotations.get("sidecar.istio.io/inject")
    injection = namespace.labels.get("istio-injection")
    if inject == "false" or injection == "disabled":
        return False
    if injection == "enabled":
        return True
    for labels in (namespace.labels, own.labels):
        if labels.get("istio.io/rev"):
            return labels["istio.io/rev"] in REVISIONS
    return inject == "true"


def _linkerd_injects(own: Asked, namespace: Asked) -> bool:
    wanted = own.annotations.get("linkerd.io/inject") or namespace.annotations.get("linkerd.io/inject")
    return wanted in ("enabled", "ingress")
