"""Pieces that several objects share: names, labels, volumes, containers' security.

Names and ports are a contract between processes, and stand here once.
"""

from __future__ import annotations

from typing import Any, Final

from deploy.values import Resources, Values

Json = dict[str, Any]

CONTROLPLANE: Final = "mycel-controlplane"
AGENT: Final = "mycel-agent"
NODEPROXY: Final = "mycel-nodeproxy"
L7PROXY: Final = "mycel-l7proxy"

#: Root key and certificate of the mesh; the bundle that everybody may read; who leads.
CA_SECRET: Final = "mycel-ca"
ROOTS: Final = "mycel-roots"
LEASE: Final = CONTROLPLANE

#: Of the processes that are not root, and of the folders on the node that they share with the agent.
USER: Final = 15008

XDS_PORT: Final = 15012
CONTROLPLANE_ADMIN: Final = 15014
WEBHOOK_PORT: Final = 15017
AGENT_ADMIN: Final = 15020
NODEPROXY_ADMIN: Final = 15021
L7PROXY_ADMIN: Final = 15090

#: Who may ask our controllers: tokens of this audience are good for nothing else.
AUDIENCE: Final = "mycel.io"
TOKENS: Final = "/var/run/secrets/mycel.io"
ROOTS_FOLDER: Final = "/etc/mycel/roots"

#: Seconds that a new pod has to stay ready before its predecessor, or the next node's, is ended: one that dies soon after it said
#: that it is ready stops a rollout.
MIN_READY: Final = 5

EVERYTHING: Final[list[Json]] = [{"operator": "Exists"}]
#: Who tolerates everything would come to Windows nodes too, and never be ready there.
LINUX: Final = {"kubernetes.io/os": "linux"}


def labels(component: str = "") -> Json:
    """Of every object of ours; with the component for those that belong to one."""
    made = {"app.kubernetes.io/name": "mycel", "app.kubernetes.io/part-of": "mycel"}
    return made | ({"app.kubernetes.io/component": component.removeprefix("mycel-")} if component else {})


def selector(component: str) -> Json:
    """What never changes of a component's labels: a workload's selector is immutable."""
    return {
        "app.kubernetes.io/name": "mycel",
        "app.kubernetes.io/component": component.removeprefix("mycel-"),
    }


def metadata(name: str, component: str = "", *, namespace: str = "") -> Json:
    """``namespace`` is empty for what belongs to the cluster."""
    return {"name": name, **({"namespace": namespace} if namespace else {}), "labels": labels(component)}


def controller_address(values: Values, namespace: str) -> str:
    """Where agents and proxies find a controller, ``HOST:PORT``. Absolute, so that one question to DNS is enough."""
    return f"{controller_name(values, namespace)}:{XDS_PORT}"


def controller_name(values: Values, namespace: str) -> str:
    return f"{CONTROLPLANE}.{namespace}.svc.{values.cluster_domain}"


def resources(chosen: Resources) -> Json:
    return {
        "requests": {"cpu": chosen.requests.cpu, "memory": chosen.requests.memory},
        "limits": {"memory": chosen.limits.memory},
    }


def unprivileged() -> Json:
    """A container's security where nothing is needed of the node."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def unprivileged_pod() -> Json:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "supplementalGroups": [USER],
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def unprivileged_with_maps() -> Json:
    """As :func:`unprivileged`, for who reads maps that the agent hands over.

    A runtime's default profile ties bpf(2) to CAP_BPF as a whole. The kernel does not (since 5.19): without the capability a
    process can read and write the maps of which it was given a descriptor, and make none.
    """
    return unprivileged() | {"seccompProfile": {"type": "Unconfined"}}


def ready(port: int) -> Json:
    """Readiness only, no liveness.

    What hangs is seen (not ready, and by `mycel check`); to kill a proxy that a busy node made slow would turn slowness into
    reset connections.
    """
    return {
        "httpGet": {"path": "/healthz/ready", "port": port},
        "periodSeconds": 2,
        "timeoutSeconds": 2,
        "failureThreshold": 3,
    }


def stays_ready(port: int, seconds: int) -> Json:
    """Ready once it has said so for ``seconds``, each second anew; and no longer, as :func:`ready`."""
    return ready(port) | {"periodSeconds": 1, "successThreshold": seconds + 1, "failureThreshold": 6}


def field(name: str, path: str) -> Json:
    """An environment variable that says what the API server knows of the pod."""
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def logging(values: Values) -> list[Json]:
    return [
        {"name": "MYCEL_LOG_LEVEL", "value": values.log.level},
        {"name": "MYCEL_LOG_FORMAT", "value": values.log.format},
    ]


def token_volume() -> Json:
    """Who we are, for our controllers. Kubelet renews it; an hour is as short as most clusters allow to be useful."""
    return {
        "name": "token",
        "projected": {
            "defaultMode": 0o440,
            "sources": [
                {"serviceAccountToken": {"audience": AUDIENCE, "expirationSeconds": 3600, "path": "token"}}
            ],
        },
    }


def token_mount() -> Json:
    return {"name": "token", "mountPath": TOKENS, "readOnly": True}


def roots_volume() -> Json:
    """The bundle that the controller's certificate chains to.

    The key is named, so that kubelet starts nobody before a controller has written the roots: otherwise they would appear in a
    running pod only when kubelet next looks, up to two minutes later.
    """
    return {
        "name": "roots",
        "configMap": {
            "name": ROOTS,
            "defaultMode": 0o444,
            "items": [{"key": "roots.pem", "path": "roots.pem"}],
        },
    }


def roots_mount() -> Json:
    return {"name": "roots", "mountPath": ROOTS_FOLDER, "readOnly": True}


def host_folder(name: str, path: str, *, create: bool = True) -> Json:
    return {"name": name, "hostPath": {"path": path, "type": "DirectoryOrCreate" if create else "Directory"}}
