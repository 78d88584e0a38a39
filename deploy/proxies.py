"""The DaemonSets of node proxy and l7proxy: no rights on the node, no token for the API server."""

from __future__ import annotations

from deploy import parts
from deploy.parts import L7PROXY, NODEPROXY, Json
from deploy.values import Proxy, Values

#: Seconds that a new one has to stay ready: of one that dies sooner the predecessor is still there, to take its listeners back.
_STAYS_READY = 3


def nodeproxy(values: Values, namespace: str) -> Json:
    arguments = [
        f"--drain-timeout={values.nodeproxy.drain_seconds}",
        f"--revoke-after={values.revoke_after}",
    ]
    return _daemon_set(NODEPROXY, parts.NODEPROXY_ADMIN, values.nodeproxy, arguments, values, namespace)


def l7proxy(values: Values, namespace: str) -> Json:
    drain = f"--drain={values.l7proxy.drain_seconds}"
    return _daemon_set(
        L7PROXY, parts.L7PROXY_ADMIN, values.l7proxy, [drain, "--access-log=-"], values, namespace
    )


def _daemon_set(
    name: str, admin: int, chosen: Proxy, arguments: list[str], values: Values, namespace: str
) -> Json:
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": parts.metadata(name, name, namespace=namespace),
        "spec": {
            "selector": {"matchLabels": parts.selector(name)},
            # No `minReadySeconds` (and a readiness that takes its time instead): with a surge, Kubernetes' controller may look
            # for the last time when the new pod has not been ready for that long yet. Such a rollout stands still for good.
            # The new one takes over the listeners before the old one drains: no connection is refused in between.
            "updateStrategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
            },
            "template": {
                "metadata": {"labels": parts.labels(name)},
                "spec": {
                    "serviceAccountName": name,
                    "automountServiceAccountToken": False,
                    "priorityClassName": chosen.priority_class_name,
                    "securityContext": parts.unprivileged_pod(),
                    "imagePullSecrets": values.image.pull_secrets,
                    "nodeSelector": parts.LINUX,
                    "tolerations": parts.EVERYTHING,
                    "terminationGracePeriodSeconds": chosen.grace_seconds,
                    "containers": [
                        {
                            "name": name.removeprefix("mycel-"),
                            "image": f"{values.image.repository}/mesh:{values.image.tag}",
                            "imagePullPolicy": values.image.pull_policy,
                            "command": [name],
                            "args": [
                                "--node=$(NODE_NAME)",
                                f"--run={values.node.run_dir}",
                                f"--controller={parts.controller_address(values, namespace)}",
                                f"--roots={parts.ROOTS_FOLDER}/roots.pem",
                                f"--credential={parts.TOKENS}/token",
                                f"--admin=$(POD_IP):{admin}",
                                *arguments,
                            ],
                            "env": [
                                parts.field("NODE_NAME", "spec.nodeName"),
                                parts.field("POD_IP", "status.podIP"),
                                *parts.logging(values),
                            ],
                            "ports": [{"name": "admin", "containerPort": admin, "protocol": "TCP"}],
                            "readinessProbe": parts.stays_ready(admin, _STAYS_READY),
                            "resources": parts.resources(chosen.resources),
                            "securityContext": parts.unprivileged_with_maps(),
                            "volumeMounts": [
                                {"name": "run", "mountPath": values.node.run_dir},
                                {"name": "tmp", "mountPath": "/tmp"},
                                parts.token_mount(),
                                parts.roots_mount(),
                            ],
                        }
                    ],
                    "volumes": [
                        parts.host_folder("run", values.node.run_dir),
                        {"name": "tmp", "emptyDir": {}},
                        parts.token_volume(),
                        parts.roots_volume(),
                    ],
                },
            },
        },
    }
