"""All objects of an installation, in the order in which they are applied, and how they are written.

The one source of ``mycel install`` and of the Helm chart. Owns the list; the objects are made by the modules of their
components.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from typing import Any

import yaml

from common.kubernetes import path_of
from deploy import agent, controlplane, parts, proxies, rbac, webhook
from deploy.parts import Json
from deploy.values import Values, chosen

#: Annotation of the namespace: what was chosen, so that ``mycel upgrade`` need not be told again.
VALUES_ANNOTATION = "mycel.io/values"

#: Of the kinds that there are here.
_PLURALS = {
    "ConfigMap": "configmaps",
    "ClusterRole": "clusterroles",
    "ClusterRoleBinding": "clusterrolebindings",
    "CustomResourceDefinition": "customresourcedefinitions",
    "DaemonSet": "daemonsets",
    "Deployment": "deployments",
    "Lease": "leases",
    "Namespace": "namespaces",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "Role": "roles",
    "RoleBinding": "rolebindings",
    "Secret": "secrets",
    "Service": "services",
    "ServiceAccount": "serviceaccounts",
    "ValidatingWebhookConfiguration": "validatingwebhookconfigurations",
}


def namespace_object(values: Values, namespace: str) -> Json:
    """The namespace, which may hold the agent (hostPID, capabilities). Not in the Helm chart: Helm needs it beforehand."""
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": namespace,
            "annotations": {VALUES_ANNOTATION: chosen(values)},
            "labels": parts.labels()
            | {
                "pod-security.kubernetes.io/enforce": "privileged",
                "pod-security.kubernetes.io/audit": "privileged",
                "pod-security.kubernetes.io/warn": "privileged",
                # We are no pods of the mesh: a mesh that needs itself to start never starts.
                "mycel.io/mesh": "disabled",
                "istio-injection": "disabled",
            },
        },
    }


def build(values: Values, namespace: str) -> list[Json]:
    """Everything but the namespace, in apply order: what is referred to comes before what refers to it."""
    return [
        *rbac.accounts(namespace),
        *rbac.rules(namespace),
        *controlplane.filled_by_controllers(namespace),
        controlplane.service(namespace),
        controlplane.disruption_budget(namespace),
        controlplane.deployment(values, namespace),
        agent.daemon_set(values, namespace),
        proxies.nodeproxy(values, namespace),
        proxies.l7proxy(values, namespace),
        webhook.configuration(values, namespace),
    ]


def own_crds() -> list[Json]:
    """Definitions of the kinds of mycel.io, if there are any."""
    folder = files("deploy") / "crds"
    if not folder.is_dir():
        return []
    found = []
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.startswith("mycel") and entry.name.endswith(".yaml"):
            found += [d for d in yaml.safe_load_all(entry.read_text("utf-8")) if d]
    return found


def key(manifest: Json) -> tuple[str, str, str, str]:
    """Group, kind, namespace and name: who an object is, whatever version it is written in."""
    group = manifest["apiVersion"].rpartition("/")[0]
    return group, manifest["kind"], manifest["metadata"].get("namespace", ""), manifest["metadata"]["name"]


def path(manifest: Json) -> str:
    """Where an object is at the API server."""
    meta = manifest["metadata"]
    return path_of(
        manifest["apiVersion"], _PLURALS[manifest["kind"]], meta.get("namespace", ""), meta["name"]
    )


def to_yaml(manifests: Iterable[Json]) -> str:
    """One stream of documents, the same bytes for the same objects."""
    return "".join(f"---\n{document(manifest)}" for manifest in manifests)


def document(manifest: Json) -> str:
    return yaml.dump(
        manifest, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=110, allow_unicode=True
    )


class _Dumper(yaml.SafeDumper):
    """No anchors: an object that two places share is written twice, as people would."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)
