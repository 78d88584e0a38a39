"""``mycel check --pre``: whether Mycel can be installed on a cluster, and what there would be in its way.

Asks the API server only, changes nothing, and needs nothing of ours on the cluster.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from cli.cluster import Cluster, Json
from common.kubernetes import ApiError, path_of
from controlplane.model.findings import Finding, Severity
from deploy import parts, webhook

#: Versions that the tests run on, and older ones that have all that we ask for (appArmorProfile, ValidatingWebhook v1, SSA).
_KUBERNETES = (1, 30)
_KERNEL = (6, 1)
_ARCHITECTURES = ("amd64", "arm64")

#: What installing does: (verb, group, resource, subresource, in our namespace).
_RIGHTS = (
    ("patch", "", "namespaces", "", False),
    ("patch", "", "serviceaccounts", "", True),
    ("patch", "", "secrets", "", True),
    ("patch", "", "configmaps", "", True),
    ("patch", "", "services", "", True),
    ("patch", "apps", "deployments", "", True),
    ("patch", "apps", "daemonsets", "", True),
    ("patch", "policy", "poddisruptionbudgets", "", True),
    ("patch", "coordination.k8s.io", "leases", "", True),
    ("patch", "rbac.authorization.k8s.io", "roles", "", True),
    ("patch", "rbac.authorization.k8s.io", "rolebindings", "", True),
    ("patch", "rbac.authorization.k8s.io", "clusterroles", "", False),
    ("patch", "rbac.authorization.k8s.io", "clusterrolebindings", "", False),
    ("patch", "admissionregistration.k8s.io", "validatingwebhookconfigurations", "", False),
    ("get", "", "pods", "proxy", True),
)

_SIDECARS = {"istio-proxy": "Istio", "linkerd-proxy": "Linkerd"}


def findings(cluster: Cluster) -> list[Finding]:
    """What is in the way, and what there is that Mycel has to live with.

    :raises Unreachable: the API server does not answer.
    """
    found: list[Finding] = []
    for look in (_version, _rights, _nodes, _earlier, _istio, _linkerd, _cilium, _injectors, _sidecars):
        try:
            found += look(cluster)
        except ApiError as error:
            message = f"cannot look for {look.__name__.strip('_')}: {error.message or error}"
            found.append(Finding(Severity.WARNING, "Cluster", "", message, "ask somebody who may read this"))
    return sorted(found, key=lambda f: (-f.severity, f.object, f.message))


def _version(cluster: Cluster) -> Iterator[Finding]:
    version = cluster.get("/version")
    text = str(version.get("gitVersion", ""))
    if (number := _number(text)) and number < _KUBERNETES:
        wanted = ".".join(map(str, _KUBERNETES))
        message = f"the API server is {text}, and Mycel needs {wanted}"
        yield Finding(Severity.ERROR, "Cluster", "", message, "upgrade Kubernetes")


def _rights(cluster: Cluster) -> Iterator[Finding]:
    """Server-side apply asks for patch, and create where the object is not there yet; who may the one mostly may the other."""
    questions = [
        (one, resource, subresource, group, here)
        for verb, group, resource, subresource, here in _RIGHTS
        for one in ((verb, "create") if verb == "patch" else (verb,))
    ]

    def allowed(question: tuple[str, str, str, str, bool]) -> bool:
        verb, resource, subresource, group, here = question
        attributes = {"verb": verb, "group": group, "resource": resource, "subresource": subresource}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes | ({"namespace": cluster.namespace} if here else {})},
        }
        answer = cluster.create(path_of("authorization.k8s.io/v1", "selfsubjectaccessreviews"), review)
        return bool(answer["status"].get("allowed"))

    with ThreadPoolExecutor(8) as pool:
        lacking = [
            f"{question[0]} {'/'.join(filter(None, question[1:3]))}"
            for question, yes in zip(questions, pool.map(allowed, questions), strict=True)
            if not yes
        ]
    if lacking:
        message = f"you may not {', '.join(lacking)}"
        yield Finding(
            Severity.ERROR, "Cluster", "", message, "install as somebody who may: cluster-admin, mostly"
        )


def _nodes(cluster: Cluster) -> Iterator[Finding]:
    linux = 0
    for node in cluster.all(path_of("v1", "nodes")):
        where, info = f"Node {node['metadata']['name']}", node["status"]["nodeInfo"]
        if info["operatingSystem"] != "linux":
            yield Finding(
                Severity.INFO,
                where,
                "",
                f"runs {info['operatingSystem']}: its pods stay outside of the mesh",
            )
            continue
        linux += 1
        kernel = info["kernelVersion"]
        if (number := _number(kernel)) and number < _KERNEL:
            wanted = ".".join(map(str, _KERNEL))
            message = f"has Linux {kernel}, and the kernel programs need {wanted}"
            yield Finding(Severity.ERROR, where, "status.nodeInfo.kernelVersion", message, "upgrade it")
        if info["architecture"] not in _ARCHITECTURES:
            message = f"is {info['architecture']}, for which there are no images"
            yield Finding(
                Severity.ERROR, where, "status.nodeInfo.architecture", message, "build them: make image"
            )
    if not linux:
        yield Finding(Severity.ERROR, "Cluster", "", "has no Linux node", "add one")


def _earlier(cluster: Cluster) -> Iterator[Finding]:
    path = path_of("rbac.authorization.k8s.io/v1", "clusterrolebindings", name=parts.CONTROLPLANE)
    binding = cluster.find(path)
    for subject in (binding or {}).get("subjects") or ():
        if subject.get("namespace") != cluster.namespace:
            message = f"Mycel is installed in namespace {subject.get('namespace')}; a cluster takes one"
            yield Finding(
                Severity.ERROR,
                f"ClusterRoleBinding {parts.CONTROLPLANE}",
                "subjects",
                message,
                f"use --namespace {subject.get('namespace')}, or mycel uninstall there first",
            )
    namespace = cluster.find(path_of("v1", "namespaces", name=cluster.namespace))
    labels = (namespace or {}).get("metadata", {}).get("labels") or {}
    level = labels.get("pod-security.kubernetes.io/enforce", "privileged")
    if level != "privileged" and labels.get("app.kubernetes.io/name") != "mycel":
        message = f"enforces Pod Security {level}, and the agent needs the node's network and processes"
        yield Finding(
            Severity.WARNING,
            f"Namespace {cluster.namespace}",
            "metadata.labels",
            message,
            "mycel install sets it to privileged; for Helm: kubectl label --overwrite namespace "
            f"{cluster.namespace} pod-security.kubernetes.io/enforce=privileged",
        )


def _istio(cluster: Cluster) -> Iterator[Finding]:
    for one in _workloads(cluster, "daemonsets", "k8s-app=istio-cni-node"):
        yield Finding(
            Severity.ERROR,
            _name("DaemonSet", one),
            "",
            "istio-cni redirects pods' traffic too: a pod cannot be in both meshes' hands",
            "remove it, or keep the namespaces of its pods out of Mycel",
        )
    for one in _workloads(cluster, "daemonsets", "app=ztunnel"):
        message = "Istio's ztunnel serves pods labelled istio.io/dataplane-mode: ambient, and so would Mycel"
        yield Finding(
            Severity.ERROR, _name("DaemonSet", one), "", message, "remove one of both from each namespace"
        )
    for one in _workloads(cluster, "deployments", "app=istiod"):
        message = (
            "istiod reads the same objects; both write their status, and its webhooks inject sidecars where "
            "istio-injection: enabled asks for it"
        )
        yield Finding(
            Severity.WARNING,
            _name("Deployment", one),
            "",
            message,
            "label namespaces with mycel.io/mesh: enabled while both are there; remove istiod when nothing needs it",
        )


def _linkerd(cluster: Cluster) -> Iterator[Finding]:
    for one in _workloads(cluster, "deployments", "linkerd.io/control-plane-component=destination"):
        message = (
            "Linkerd's control plane reads the same objects, and injects where its annotation asks for it"
        )
        yield Finding(
            Severity.WARNING,
            _name("Deployment", one),
            "",
            message,
            "take linkerd.io/inject from namespaces that move to Mycel, and label them mycel.io/mesh: enabled",
        )
    for one in _workloads(cluster, "daemonsets", "k8s-app=linkerd-cni"):
        yield Finding(
            Severity.WARNING,
            _name("DaemonSet", one),
            "",
            "linkerd-cni sets redirection up in pods that have Linkerd's sidecar; others it leaves alone",
        )


def _cilium(cluster: Cluster) -> Iterator[Finding]:
    # Wherever it is installed: kube-system is a habit only.
    for config in cluster.all(path_of("v1", "configmaps"), fieldSelector="metadata.name=cilium-config"):
        data, where = config.get("data") or {}, _name("ConfigMap", config)
        socket = data.get("bpf-lb-sock") == "true" or data.get("kube-proxy-replacement") in ("true", "strict")
        if socket and data.get("bpf-lb-sock-hostns-only") != "true":
            yield Finding(
                Severity.ERROR,
                where,
                "data.bpf-lb-sock-hostns-only",
                "Cilium's socket load balancer chooses a backend in connect(), before Mycel sees which service was dialled",
                "set socketLB.hostNamespaceOnly=true in Cilium's values",
            )
        if data.get("cni-exclusive", "true") == "true":
            yield Finding(
                Severity.ERROR,
                where,
                "data.cni-exclusive",
                "Cilium removes other plugins' entries from the CNI configuration",
                "set cni.exclusive=false in Cilium's values",
            )


def _injectors(cluster: Cluster) -> Iterator[Finding]:
    path = path_of("admissionregistration.k8s.io/v1", "mutatingwebhookconfigurations")
    for one in cluster.all(path):
        name = one["metadata"]["name"]
        for mesh, pattern in (("Istio", "istio-sidecar-injector"), ("Linkerd", "linkerd-proxy-injector")):
            if name.startswith(pattern):
                yield Finding(
                    Severity.WARNING,
                    f"MutatingWebhookConfiguration {name}",
                    "",
                    f"injects {mesh}'s sidecars; a pod that has one stays outside of the mesh",
                    "remove it once no namespace needs it",
                )
    for one in cluster.all(path_of("admissionregistration.k8s.io/v1", "validatingwebhookconfigurations")):
        name = one["metadata"]["name"]
        if name.startswith(("istio-validator", "istiod-default-validator", "linkerd-policy-validator")):
            yield Finding(
                Severity.INFO,
                f"ValidatingWebhookConfiguration {name}",
                "",
                "judges the same objects: one is stored only if both take it",
            )
        if (
            name == webhook.NAME
            and one["metadata"].get("labels", {}).get("app.kubernetes.io/name") != "mycel"
        ):
            message = "has our name and is somebody else's: installing would take it over"
            yield Finding(Severity.ERROR, f"ValidatingWebhookConfiguration {name}", "", message, "rename it")


def _sidecars(cluster: Cluster) -> Iterator[Finding]:
    count: dict[tuple[str, str], int] = {}
    for pod in cluster.all(path_of("v1", "pods")):
        spec = pod["spec"]
        for container in [*spec["containers"], *(spec.get("initContainers") or ())]:
            if mesh := _SIDECARS.get(container["name"]):
                key = mesh, pod["metadata"]["namespace"]
                count[key] = count.get(key, 0) + 1
                break
    for (mesh, namespace), number in sorted(count.items()):
        pods, they = ("1 pod has", "it") if number == 1 else (f"{number} pods have", "they")
        message = f"{pods} {mesh}'s sidecar: {they} would stay outside of the mesh"
        yield Finding(
            Severity.WARNING,
            f"Namespace {namespace}",
            "",
            message,
            "restart them without injection to enrol them",
        )


def _workloads(cluster: Cluster, plural: str, selector: str) -> list[Json]:
    return cluster.all(path_of("apps/v1", plural), labelSelector=selector)


def _name(kind: str, one: Json) -> str:
    return f"{kind} {one['metadata']['namespace']}/{one['metadata']['name']}"


def _number(version: str) -> tuple[int, int] | None:
    """Major and minor of ``v1.36.0``, ``6.1.0-18-amd64``; None of what is none."""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None
