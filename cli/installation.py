"""What of an installation is there and runs: the cluster half of ``mycel check``, and what ``mycel upgrade`` waits for.

Owns the judgement of our workloads, nodes, webhook and certificates by what the API server knows of them; what our processes
say of themselves is :mod:`cli.check`'s.
"""

from __future__ import annotations

import base64
import binascii
import datetime
from collections.abc import Iterable, Sequence

from cryptography import x509

from cli import check, watch
from cli.cluster import Cluster, Json
from cli.http import Unreachable
from common.kubernetes import ApiError, path_of
from controlplane.model.findings import Finding, Severity
from deploy import parts, webhook

DAEMON_SETS = (parts.AGENT, parts.NODEPROXY, parts.L7PROXY)

#: Certificates that end within so many days are told of.
_ROOT_DAYS = 90
_WEBHOOK_DAYS = 1
#: Of the pods that are not ready so many are told of one by one.
_SHOWN = 5

_ANOTHER_ROOT = "make another root, by hand: docs/kubernetes.md, Another root"
_INSTALL = "mycel install | kubectl apply --server-side -f -"


def findings(cluster: Cluster) -> list[Finding]:
    """All that is to say of a cluster.

    :raises Unreachable: the API server does not answer.
    :raises ApiError: it refuses what this needs.
    """
    if cluster.find(path_of("v1", "namespaces", name=cluster.namespace)) is None:
        message = (
            f"namespace {cluster.namespace} is not there: Mycel is not installed, or elsewhere (--namespace)"
        )
        return [Finding(Severity.ERROR, "Mesh", "", message, _INSTALL)]
    found = [*rollout(cluster), *_roots(cluster), *_webhook(cluster)]
    cluster.know_admins()
    controllers = [
        cluster.admin_of(pod, parts.CONTROLPLANE_ADMIN)
        for pod in cluster.pods(parts.CONTROLPLANE)
        if _ready(pod)
    ]
    if not controllers:
        message = "no controller is ready: the mesh goes on with what it has, and gets no changes"
        found.append(Finding(Severity.ERROR, "Mesh", "", message, _logs(cluster, parts.CONTROLPLANE)))
        return check.ordered([*found, *check.LIMITS])
    try:
        found += check.online(controllers, cluster)
        found += _nodes(cluster, watch.fleet(controllers, cluster))
    except Unreachable as error:
        found.append(Finding(Severity.ERROR, "Mesh", "", str(error), _logs(cluster, parts.CONTROLPLANE)))
    return check.ordered(found)


def controllers(cluster: Cluster) -> list[str]:
    """Admin addresses of the controllers that are ready.

    :raises Unreachable: none is.
    """
    cluster.know_admins()
    found = [
        cluster.admin_of(pod, parts.CONTROLPLANE_ADMIN)
        for pod in cluster.pods(parts.CONTROLPLANE)
        if _ready(pod)
    ]
    if not found:
        raise Unreachable(f"no controller in namespace {cluster.namespace} is ready: see mycel check")
    return found


def rollout(cluster: Cluster, names: Sequence[str] = (parts.CONTROLPLANE, *DAEMON_SETS)) -> list[Finding]:
    """Workloads that are missing, or whose pods are not all of their present version and ready."""
    found = []
    for name in names:
        deployment = name == parts.CONTROLPLANE
        kind = "Deployment" if deployment else "DaemonSet"
        path = path_of("apps/v1", kind.lower() + "s", cluster.namespace, name)
        workload = cluster.find(path)
        where = f"{kind} {cluster.namespace}/{name}"
        if workload is None:
            found.append(Finding(Severity.ERROR, where, "", "is not there", _INSTALL))
            continue
        if message := (_deployment if deployment else _daemon_set)(workload):
            pods = {pod["metadata"]["name"]: pod for pod in cluster.pods(name)}
            reasons = {pod: why for pod in sorted(pods) if (why := _why_not_ready(pods[pod]))}
            shown = [f"{pod}: {why}" for pod, why in list(reasons.items())[:_SHOWN]]
            if len(reasons) > _SHOWN:
                shown.append(f"and {len(reasons) - _SHOWN} more")
            text = message + (": " + "; ".join(shown) if shown else "")
            action = _look_at(pods[next(iter(reasons))]) if reasons else _logs(cluster, name)
            found.append(Finding(Severity.ERROR, where, "", text, action))
    return found


def _deployment(workload: Json) -> str:
    wanted, status = workload["spec"].get("replicas", 1), workload.get("status") or {}
    if status.get("observedGeneration", 0) < workload["metadata"]["generation"]:
        return "was changed a moment ago"
    updated, ready = status.get("updatedReplicas", 0), status.get("readyReplicas", 0)
    if updated < wanted or ready < wanted or status.get("replicas", 0) > wanted:
        return f"{ready} of {wanted} are ready, {updated} of the present version"
    return ""


def _daemon_set(workload: Json) -> str:
    status = workload.get("status") or {}
    if status.get("observedGeneration", 0) < workload["metadata"]["generation"]:
        return "was changed a moment ago"
    wanted = status.get("desiredNumberScheduled", 0)
    updated, ready = status.get("updatedNumberScheduled", 0), status.get("numberReady", 0)
    if not wanted:
        return "no node is there for it"
    if min(updated, ready) < wanted:
        return f"{ready} of {wanted} are ready, {updated} of the present version"
    return ""


def progress(cluster: Cluster, names: Sequence[str]) -> int:
    """How far workloads are on their way: grows with each pod that is of the present version, or has stayed ready."""
    total = 0
    for name in names:
        plural = "deployments" if name == parts.CONTROLPLANE else "daemonsets"
        workload = cluster.find(path_of("apps/v1", plural, cluster.namespace, name)) or {}
        status = workload.get("status") or {}
        if status.get("observedGeneration", 0) < workload.get("metadata", {}).get("generation", 0):
            continue  # it tells of the version before
        for field in ("updatedReplicas", "availableReplicas", "updatedNumberScheduled", "numberAvailable"):
            total += status.get(field, 0)
    return total


def _ready(pod: Json) -> bool:
    return not pod["metadata"].get("deletionTimestamp") and any(
        c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions") or ()
    )


def _why_not_ready(pod: Json) -> str:
    """What the API server knows of why a pod is not ready; empty if it is, or is on its way out."""
    if _ready(pod) or pod["metadata"].get("deletionTimestamp"):
        return ""
    status = pod["status"]
    for container in status.get("containerStatuses") or ():
        state = container.get("state") or {}
        if waiting := state.get("waiting"):
            last = (container.get("lastState") or {}).get("terminated") or {}
            ended = f", ended before with status {last['exitCode']}" if last else ""
            return f"{waiting.get('reason', 'waiting')}{ended}"
        if "running" in state:
            return "runs and is not ready"
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] != "True":
            return str(condition.get("message") or condition.get("reason"))
    return str(status.get("phase", "unknown"))


def _look_at(pod: Json) -> str:
    """The command that says more of why this pod, of many, is not ready."""
    meta = pod["metadata"]
    states = [one.get("state") or {} for one in pod["status"].get("containerStatuses") or ()]
    logs = f"kubectl logs -n {meta['namespace']} {meta['name']}"
    if any("running" in state for state in states):
        return logs
    if any((state.get("waiting") or {}).get("reason") == "CrashLoopBackOff" for state in states):
        return f"{logs} --previous"
    return f"kubectl describe pod -n {meta['namespace']} {meta['name']}"


def _nodes(cluster: Cluster, fleet: watch.Fleet) -> list[Finding]:
    """Nodes of which no controller has heard at all; those with a part of ours are told of by :func:`cli.check.clients`."""
    heard = {client.node for client in fleet.clients}
    found = []
    for pod in cluster.pods(parts.AGENT):
        node = pod["spec"].get("nodeName", "")
        if node and node not in heard:
            message = "no agent or proxy of this node is connected to a controller"
            action = f"kubectl logs -n {cluster.namespace} {pod['metadata']['name']}"
            found.append(Finding(Severity.ERROR, f"Node {node}", "", message, action))
    return found


def _roots(cluster: Cluster) -> list[Finding]:
    """The mesh's root certificates, by the public bundle."""
    where = f"ConfigMap {cluster.namespace}/{parts.ROOTS}"
    bundle = cluster.find(path_of("v1", "configmaps", cluster.namespace, parts.ROOTS))
    if bundle is None:
        return [Finding(Severity.ERROR, where, "", "is not there", _INSTALL)]
    text = (bundle.get("data") or {}).get("roots.pem", "")
    if not text:
        message = "has no roots yet: agents and proxies wait for a controller to write them"
        return [Finding(Severity.ERROR, where, "data", message, _logs(cluster, parts.CONTROLPLANE))]
    return _expiring(cluster, where, "data", text.encode(), _ROOT_DAYS, "the mesh's root")


def _webhook(cluster: Cluster) -> list[Finding]:
    where = f"ValidatingWebhookConfiguration {webhook.NAME}"
    path = path_of("admissionregistration.k8s.io/v1", "validatingwebhookconfigurations", name=webhook.NAME)
    try:
        configuration = cluster.find(path)
    except ApiError as error:
        if error.status == 403:
            return [Finding(Severity.INFO, where, "", "not looked at: you may not read it")]
        raise
    if configuration is None:
        return [Finding(Severity.ERROR, where, "", "is not there: nobody refuses bad objects", _INSTALL)]
    found = []
    for number, one in enumerate(configuration.get("webhooks") or ()):
        field = f"webhooks[{number}].clientConfig.caBundle"
        try:
            bundle = base64.b64decode(one["clientConfig"].get("caBundle") or "", validate=True)
        except binascii.Error:
            bundle = b""
        if not bundle:
            message = "is empty: the API server cannot ask our controllers about objects"
            found.append(Finding(Severity.WARNING, where, field, message, _logs(cluster, parts.CONTROLPLANE)))
        else:
            found += _expiring(
                cluster, where, field, bundle, _WEBHOOK_DAYS, "the webhook's certificate authority"
            )
    return found


def _expiring(cluster: Cluster, where: str, field: str, pem: bytes, days: int, what: str) -> list[Finding]:
    """Whether the one of a bundle's certificates that lives longest is good for long enough."""
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        # The leader puts right what others wrote there.
        action = f"if this stays: {_logs(cluster, parts.CONTROLPLANE)}"
        return [Finding(Severity.ERROR, where, field, f"holds no certificates: {error}", action)]
    newest = max(certificate.not_valid_after_utc for certificate in certificates)
    left = newest - datetime.datetime.now(datetime.UTC)
    if left <= datetime.timedelta():
        message = f"{what} has expired ({newest:%Y-%m-%d})"
        return [Finding(Severity.ERROR, where, field, message, _ANOTHER_ROOT)]
    if left < datetime.timedelta(days=days):
        message = f"{what} expires in {left.days} days ({newest:%Y-%m-%d})"
        return [Finding(Severity.WARNING, where, field, message, _ANOTHER_ROOT)]
    return []


def _logs(cluster: Cluster, name: str) -> str:
    kind = "deployment" if name == parts.CONTROLPLANE else "daemonset"
    return f"kubectl logs -n {cluster.namespace} {kind}/{name}"


def errors(found: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.severity is Severity.ERROR]
