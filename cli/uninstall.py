"""``mycel uninstall``: takes everything of ours off a cluster and its nodes, and nothing else.

The order matters. The webhook goes first, so that it stands in nobody's way; then the agents' DaemonSet alone, because an agent
that ends asks whether it is gone, and takes CNI entry, plugin, programs and pins off its node only then, for which it needs its
right to ask. When every agent has ended, the rest follows. What users made stays, and so do other projects' definitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cli.cluster import Cluster, Json
from common.kubernetes import ApiError, path_of
from deploy import manifests, parts
from deploy.values import Values

_INTERVAL = 0.3

#: What the cluster itself puts into every namespace.
_ANYBODYS = {("ConfigMap", "kube-root-ca.crt"), ("ServiceAccount", "default")}
#: Where somebody may have put something of theirs.
_PLACES = (
    ("v1", "ConfigMap", "configmaps"),
    ("v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
    ("v1", "Pod", "pods"),
    ("v1", "Secret", "secrets"),
    ("v1", "Service", "services"),
    ("v1", "ServiceAccount", "serviceaccounts"),
    ("apps/v1", "DaemonSet", "daemonsets"),
    ("apps/v1", "Deployment", "deployments"),
    ("apps/v1", "StatefulSet", "statefulsets"),
    ("batch/v1", "CronJob", "cronjobs"),
    ("batch/v1", "Job", "jobs"),
)


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
    _wait_pods_gone(cluster, "", timeout)
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
    pods = {pod["metadata"]["name"]: pod for pod in cluster.pods(parts.AGENT)}
    # In the foreground: it is there, and going, until its pods have ended.
    if not cluster.delete(path, propagationPolicy="Foreground") and not pods:
        return
    say(f"agents: asked to leave {len(pods)} nodes")
    ended: dict[str, int] = {}
    deadline = time.monotonic() + timeout
    while True:
        there = {pod["metadata"]["name"]: pod for pod in cluster.pods(parts.AGENT)}
        pods |= there
        for name, pod in there.items():
            for container in pod["status"].get("containerStatuses") or ():
                if terminated := (container.get("state") or {}).get("terminated"):
                    ended[name] = int(terminated["exitCode"])
        if not there and cluster.find(path) is None:
            break
        if time.monotonic() > deadline:
            raise _not_clean(
                sorted(pod["spec"].get("nodeName", "?") for pod in there.values()), "has not ended"
            )
        time.sleep(_INTERVAL)
    failed = sorted(pods[name]["spec"].get("nodeName", "?") for name, status in ended.items() if status)
    if failed:
        raise _not_clean(failed, "ended with an error")
    say("agents: gone, their nodes are clean")


def _not_clean(nodes: list[str], what: str) -> UninstallError:
    return UninstallError(
        f"the agent {what} on {', '.join(nodes)}: nothing else was removed, so that it can go on; when a node is gone for "
        "good, delete its Node object; to clean one by hand run mycel-agent --leave on it; then call this again"
    )


def _wait_pods_gone(cluster: Cluster, component: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while there := cluster.pods(component):
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
    """What there is in the namespace that is neither ours nor the cluster's own."""
    found = []
    for version, kind, plural in _PLACES:
        try:
            objects = cluster.all(path_of(version, plural, cluster.namespace))
        except ApiError as error:
            found.append(f"{plural} that you may not see ({error.status})")
            continue
        for one in objects:
            meta = one["metadata"]
            ours = (meta.get("labels") or {}).get("app.kubernetes.io/name") == "mycel"
            if not ours and not meta.get("deletionTimestamp") and (kind, meta["name"]) not in _ANYBODYS:
                found.append(f"{kind} {meta['name']}")
    return found
