"""``mycel uninstall``: takes everything of ours off a cluster and its nodes, and nothing else.

The order matters. The webhook goes first, so that it stands in nobody's way; then the agents' DaemonSet alone, because an agent
that ends asks whether it is gone, and takes CNI entry, plugin, programs and pins off its node only then, for which it needs its
right to ask. When every agent has ended, the rest follows. What users made stays, and so do other projects' definitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from cli.cluster import Cluster, Json
from common.kubernetes import ApiError, path_of
from controlplane.source import Key
from deploy import manifests, parts
from deploy.values import Values

_INTERVAL = 0.3
#: Seconds until the end of a pod that is gone has been told of.
_TOLD = 3.0

#: What the cluster itself, or a control plane in it, puts into every namespace.
_ANYBODYS = {
    ("ConfigMap", "kube-root-ca.crt"),
    ("ConfigMap", "istio-ca-root-cert"),
    ("ServiceAccount", "default"),
}
#: What happened; nobody's property.
_EVENTS = {("", "events"), ("events.k8s.io", "events")}


class UninstallError(Exception):
    """It could not be done in full. The text says what is left and what to do."""


def run(cluster: Cluster, *, timeout: float, say: Callable[[str], Any]) -> list[str]:
    """Remove everything; what was deliberately left, and why.

    :param timeout: seconds for the agents to leave their nodes, and for the namespace to be gone.
    :raises UninstallError: nodes are not clean, or the namespace does not go.
    """
    objects = manifests.build(Values(), cluster.namespace)
    by_kind = {(one["kind"], one["metadata"]["name"]): one for one in objects}
    for one in objects:
        if one["kind"] == "ValidatingWebhookConfiguration":
            _delete_ours(cluster, one)
    _agents(cluster, manifests.path(by_kind["DaemonSet", parts.AGENT]), timeout, say)
    for one in reversed(objects):
        _delete_ours(cluster, one)
    _wait_pods_gone(cluster, timeout)
    say("controllers, proxies and their rights: gone")
    left = [*_definitions(cluster), *_namespace(cluster, timeout)]
    say("done" if not left else "done; left as it is:")
    return left


def _delete_ours(cluster: Cluster, one: Json) -> None:
    """Delete an object, unless somebody else has one of that name."""
    path = manifests.path(one)
    there = cluster.find(path)
    if there is None:
        return
    labels = there["metadata"].get("labels") or {}
    if labels.get("app.kubernetes.io/name") == "mycel":
        cluster.delete(path, propagationPolicy="Background")


def _agents(cluster: Cluster, path: str, timeout: float, say: Callable[[str], Any]) -> None:
    """Delete the DaemonSet and wait until every agent has taken itself off its node.

    :raises UninstallError: some have not.
    """
    selector = ",".join(f"{name}={value}" for name, value in parts.selector(parts.AGENT).items())
    pods_path = path_of("v1", "pods", cluster.namespace)
    # Each agent's pod as it was last: how it ended is told at its deletion, and never again.
    pods: dict[str, Json] = {}
    gone: set[str] = set()

    def seen(pod: Json, deleted: bool) -> None:
        name = pod["metadata"]["name"]
        pods[name] = pod
        if deleted:
            gone.add(name)

    with cluster.watching(pods_path, seen, labelSelector=selector):
        # Evicted before, say: what it could have left, its successor takes away.
        before = {name for name, pod in pods.items() if pod["status"].get("phase") in ("Succeeded", "Failed")}
        # In the foreground: it is there, and going, until its pods have ended.
        if not cluster.delete(path, propagationPolicy="Foreground") and not pods:
            return
        number = len({_node(pod) for pod in pods.values()})
        say(f"agents: asked to leave {number} node{'' if number == 1 else 's'}")
        deadline = time.monotonic() + timeout
        while True:
            there = cluster.all(pods_path, labelSelector=selector)
            if not there and cluster.find(path) is None:
                break
            if time.monotonic() > deadline:
                raise _not_clean({_node(pod): "has not ended" for pod in there})
            time.sleep(_INTERVAL)
        told = time.monotonic() + _TOLD
        while not gone >= pods.keys() and time.monotonic() < told:
            time.sleep(_INTERVAL / 10)
        ended = {_node(pod): _how_ended(pod) for name, pod in list(pods.items()) if name not in before}
    if wrong := {node: how for node, how in ended.items() if how}:
        raise _not_clean(wrong)
    say("agents: gone, their nodes are clean")


def _how_ended(pod: Json) -> str:
    """What is wrong with the end of an agent that is gone; empty if it has done all that it had to."""
    if not pod["spec"].get("nodeName"):
        return ""  # was never anywhere
    for container in pod["status"].get("containerStatuses") or ():
        state = container.get("state") or {}
        if terminated := state.get("terminated"):
            return f"ended with status {terminated['exitCode']}" if terminated["exitCode"] else ""
        if "running" in state:
            return "was not seen to end"
    return "did not run when it was to leave"


def _node(pod: Json) -> str:
    return str(pod["spec"].get("nodeName") or "no node")


def _not_clean(nodes: dict[str, str]) -> UninstallError:
    """:param nodes: what is wrong with the agent of each."""
    seen = "; ".join(f"the agent on {node} {what}" for node, what in sorted(nodes.items()))
    return UninstallError(
        f"{seen}: nothing else was removed, so that it can go on. When a node is gone for good, delete its Node object; "
        "one that is not clean: docs/kubernetes.md, A node that is not clean; then call this again"
    )


def _wait_pods_gone(cluster: Cluster, timeout: float) -> None:
    """Those that have ended too: until kubelet has cleaned up after one, it is there.

    :raises UninstallError: some do not go.
    """
    deadline = time.monotonic() + timeout
    path, selector = path_of("v1", "pods", cluster.namespace), "app.kubernetes.io/name=mycel"
    while there := cluster.all(path, labelSelector=selector):
        if time.monotonic() > deadline:
            names = ", ".join(sorted(pod["metadata"]["name"] for pod in there))
            raise UninstallError(f"these pods do not end: {names}")
        time.sleep(_INTERVAL)


def _definitions(cluster: Cluster) -> list[str]:
    """Delete definitions of mycel.io that nobody has objects of; those that stay."""
    left = []
    for crd in cluster.all(path_of("apiextensions.k8s.io/v1", "customresourcedefinitions")):
        spec = crd["spec"]
        if spec["group"] != "mycel.io" and not spec["group"].endswith(".mycel.io"):
            continue
        served = next(version["name"] for version in spec["versions"] if version["served"])
        objects = cluster.all(path_of(f"{spec['group']}/{served}", spec["names"]["plural"]))
        name = crd["metadata"]["name"]
        if objects:
            left.append(f"CustomResourceDefinition {name}: {len(objects)} objects of yours")
        else:
            cluster.delete(path_of("apiextensions.k8s.io/v1", "customresourcedefinitions", name=name))
    return left


def _namespace(cluster: Cluster, timeout: float) -> list[str]:
    """Delete the namespace if it is ours and nobody else has anything in it."""
    path = path_of("v1", "namespaces", name=cluster.namespace)
    there = cluster.find(path)
    if there is None:
        return []
    where = f"Namespace {cluster.namespace}"
    if (there["metadata"].get("labels") or {}).get("app.kubernetes.io/name") != "mycel":
        return [f"{where}: not made by mycel install"]
    foreign = _foreign(cluster)
    if foreign:
        return [f"{where}: holds {', '.join(foreign)}"]
    cluster.delete(path)
    deadline = time.monotonic() + timeout
    while (there := cluster.find(path)) is not None:
        if time.monotonic() > deadline:
            conditions = there["status"].get("conditions") or ()
            reasons = [c["message"] for c in conditions if c["status"] == "True"]
            raise UninstallError(
                f"{where} does not go: {'; '.join(reasons) or 'the API server does not say why'}"
            )
        time.sleep(_INTERVAL)
    return []


def _foreign(cluster: Cluster) -> list[str]:
    """What there is in the namespace, of any kind, that is neither ours nor the cluster's own: all of it would go with it."""

    def look(kind: _Namespaced) -> list[str]:
        try:
            objects = cluster.all(path_of(kind.version, kind.plural, cluster.namespace))
        except ApiError as error:
            return [f"{kind.plural} that you may not see ({error.status})"]
        return [
            str(Key(kind.group, kind.kind, "", one["metadata"]["name"]))
            for one in objects
            if not _derived(one) and (kind.kind, one["metadata"]["name"]) not in _ANYBODYS
        ]

    with ThreadPoolExecutor(8) as pool:
        kinds, unknown = _kinds(cluster, pool)
        return [*unknown, *(text for found in pool.map(look, kinds) for text in found)]


def _derived(one: Json) -> bool:
    """Ours, on its way out, or made from another object and going with that."""
    meta = one["metadata"]
    ours = (meta.get("labels") or {}).get("app.kubernetes.io/name") == "mycel"
    return ours or bool(meta.get("deletionTimestamp") or meta.get("ownerReferences"))


class _Namespaced(NamedTuple):
    """A kind whose objects live in namespaces."""

    group: str
    version: str  #: with the group, as in apiVersion
    plural: str
    kind: str


def _kinds(cluster: Cluster, pool: ThreadPoolExecutor) -> tuple[list[_Namespaced], list[str]]:
    """Every kind that somebody may make objects of in a namespace, and groups of which nobody can tell."""
    groups = cluster.get("/apis")["groups"]
    versions = ["v1", *(one["groupVersion"] for group in groups for one in group["versions"])]

    def read(version: str) -> list[_Namespaced] | str:
        try:
            found = cluster.get(f"/apis/{version}" if "/" in version else f"/api/{version}")["resources"]
        except ApiError as error:
            if error.status == 404:  # went a moment ago
                return []
            return f"objects of {version} that cannot be looked for ({error.status})"
        group = version.rpartition("/")[0]
        return [
            _Namespaced(group, version, one["name"], one["kind"])
            for one in found
            if one["namespaced"] and {"list", "delete"} <= set(one["verbs"]) and "/" not in one["name"]
        ]

    kinds: dict[tuple[str, str], _Namespaced] = {}
    unknown = []
    for answer in pool.map(read, versions):
        if isinstance(answer, str):
            unknown.append(answer)
            continue
        for kind in answer:
            if (kind.group, kind.plural) not in _EVENTS:
                kinds.setdefault((kind.group, kind.plural), kind)
    return list(kinds.values()), unknown
