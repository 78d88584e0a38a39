"""The controller: Deployment, Service, budget, and the objects that controllers fill."""

from __future__ import annotations

from deploy import parts
from deploy.parts import CONTROLPLANE, Json
from deploy.values import Values


def filled_by_controllers(namespace: str) -> list[Json]:
    """Applied empty: server-side apply leaves alone what it does not name, so nobody needs the right to create these."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": parts.metadata(parts.CA_SECRET, CONTROLPLANE, namespace=namespace),
            "type": "Opaque",
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": parts.metadata(parts.ROOTS, CONTROLPLANE, namespace=namespace),
        },
        {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": parts.metadata(parts.LEASE, CONTROLPLANE, namespace=namespace),
        },
    ]


def service(namespace: str) -> Json:
    ports = [
        ("grpc-xds", parts.XDS_PORT, "xds"),
        ("http-admin", parts.CONTROLPLANE_ADMIN, "admin"),
        ("https-webhook", 443, "webhook"),
    ]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": parts.metadata(CONTROLPLANE, CONTROLPLANE, namespace=namespace),
        "spec": {
            "type": "ClusterIP",
            "selector": parts.selector(CONTROLPLANE),
            "ports": [
                {"name": name, "port": port, "protocol": "TCP", "targetPort": target}
                for name, port, target in ports
            ],
        },
    }


def disruption_budget(namespace: str) -> Json:
    """One controller is enough, but draining a node must not take the last."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": parts.metadata(CONTROLPLANE, CONTROLPLANE, namespace=namespace),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": parts.selector(CONTROLPLANE)}},
    }


def deployment(values: Values, namespace: str) -> Json:
    chosen = values.controlplane
    spread = {
        "labelSelector": {"matchLabels": parts.selector(CONTROLPLANE)},
        "topologyKey": "kubernetes.io/hostname",
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": parts.metadata(CONTROLPLANE, CONTROLPLANE, namespace=namespace),
        "spec": {
            "replicas": chosen.replicas,
            "selector": {"matchLabels": parts.selector(CONTROLPLANE)},
            "minReadySeconds": parts.MIN_READY,
            # The new one is ready before an old one ends: its clients find another at once.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {
                "metadata": {"labels": parts.labels(CONTROLPLANE)},
                "spec": {
                    "serviceAccountName": CONTROLPLANE,
                    "priorityClassName": chosen.priority_class_name,
                    "securityContext": parts.unprivileged_pod(),
                    "imagePullSecrets": values.image.pull_secrets,
                    "nodeSelector": chosen.node_selector,
                    "tolerations": chosen.tolerations,
                    "terminationGracePeriodSeconds": 20,
                    "affinity": {
                        "podAntiAffinity": {
                            "preferredDuringSchedulingIgnoredDuringExecution": [
                                {"weight": 100, "podAffinityTerm": spread}
                            ]
                        }
                    },
                    "containers": [_container(values, namespace)],
                    "volumes": [
                        # A controller keeps what it must keep in the cluster; this is for the last good objects. Secrets
                        # that some of them refer to are among these: never on a disk.
                        {"name": "state", "emptyDir": {"medium": "Memory"}},
                        # The copy of the root, for a restart without the API server: never on a disk.
                        {"name": "ca", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
                        {"name": "tmp", "emptyDir": {}},
                        parts.token_volume(),
                    ],
                },
            },
        },
    }


def _container(values: Values, namespace: str) -> Json:
    return {
        "name": "controlplane",
        "image": f"{values.image.repository}/mesh:{values.image.tag}",
        "imagePullPolicy": values.image.pull_policy,
        "command": ["mycel-controlplane"],
        "args": [
            "--kubernetes",
            f"--namespace={namespace}",
            "--state=/var/lib/mycel",
            f"--listen=0.0.0.0:{parts.XDS_PORT}",
            f"--admin=0.0.0.0:{parts.CONTROLPLANE_ADMIN}",
            f"--webhook=0.0.0.0:{parts.WEBHOOK_PORT}",
            "--server-name",
            f"{CONTROLPLANE}.{namespace}.svc",
            parts.controller_name(values, namespace),
            f"--trust-domain={values.trust_domain}",
            "--replica=$(POD_NAME)",
        ],
        "env": [
            parts.field("POD_NAME", "metadata.name"),
            parts.field("POD_IP", "status.podIP"),
            *parts.logging(values),
        ],
        "ports": [
            {"name": "xds", "containerPort": parts.XDS_PORT, "protocol": "TCP"},
            {"name": "admin", "containerPort": parts.CONTROLPLANE_ADMIN, "protocol": "TCP"},
            {"name": "webhook", "containerPort": parts.WEBHOOK_PORT, "protocol": "TCP"},
        ],
        "readinessProbe": parts.ready(parts.CONTROLPLANE_ADMIN),
        "resources": parts.resources(values.controlplane.resources),
        "securityContext": parts.unprivileged(),
        "volumeMounts": [
            {"name": "state", "mountPath": "/var/lib/mycel"},
            {"name": "ca", "mountPath": "/var/lib/mycel/ca"},
            {"name": "tmp", "mountPath": "/tmp"},
            parts.token_mount(),
        ],
    }
