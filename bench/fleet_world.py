"""A large cluster's objects, as its API server has them: nodes, our own pods on each, and applications."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from common.kubernetes import Client, path_of

Json = dict[str, Any]

NAMESPACE = "mycel-system"
COMPONENTS = ("agent", "nodeproxy", "l7proxy")
_AT_ONCE = 24


@dataclass(frozen=True, slots=True)
class Size:
    """How large. Every service has a VirtualService and a DestinationRule with two subsets."""

    services: int = 1000
    replicas: int = 10
    namespaces: int = 20
    nodes: int = 200


def space(number: int, size: Size) -> str:
    """The namespace of a service."""
    return f"team-{number % size.namespaces:02d}"


def service(number: int) -> str:
    return f"service-{number:04d}"


def pod_name(number: int, replica: int) -> str:
    return f"{service(number)}-6d5c9f7b8-{replica:05d}"


async def create(client: Client, size: Size) -> dict[str, dict[str, str]]:
    """Make it all; the tokens of our pods by node and component.

    :raises ApiError: something was refused.
    """
    await _all(client, _first(size))
    await _all(client, _second(size))
    ours = [(node, component) for node in range(size.nodes) for component in COMPONENTS]
    tokens: dict[str, dict[str, str]] = {}
    slots = asyncio.Semaphore(_AT_ONCE)

    async def token(node: int, component: str) -> None:
        async with slots:
            pod = await client.create(path_of("v1", "pods", NAMESPACE), _own_pod(node, component))
            name = pod["metadata"]["name"]
            await _status(client, NAMESPACE, name, f"10.250.{node // 250}.{node % 250 + 1}", True)
            reference = {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod["metadata"]["uid"]}
            spec = {"audiences": ["mycel.io"], "expirationSeconds": 7200, "boundObjectRef": reference}
            account = f"{path_of('v1', 'serviceaccounts', NAMESPACE, f'mycel-{component}')}/token"
            answer = await client.create(account, {"spec": spec})
            tokens.setdefault(_node(node), {})[component] = answer["status"]["token"]

    async def pod(number: int, replica: int) -> None:
        async with slots:
            namespace, index = space(number, size), number * size.replicas + replica
            body = _pod(number, replica, index, size)
            made = await client.create(path_of("v1", "pods", namespace), body)
            address = f"10.{100 + index // 60000}.{index // 250 % 240}.{index % 250 + 1}"
            await _status(client, namespace, made["metadata"]["name"], address, True)

    await asyncio.gather(*(token(*which) for which in ours))
    await asyncio.gather(*(pod(n, r) for n in range(size.services) for r in range(size.replicas)))
    return tokens


async def set_ready(client: Client, size: Size, number: int, replica: int, ready: bool) -> None:
    """What kubelet writes when a pod's readiness changes."""
    index = number * size.replicas + replica
    address = f"10.{100 + index // 60000}.{index // 250 % 240}.{index % 250 + 1}"
    await _status(client, space(number, size), pod_name(number, replica), address, ready)


def policy(number: int, size: Size, port: int) -> Json:
    """An AuthorizationPolicy for the pods of one service."""
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "measured", "namespace": space(number, size)},
        "spec": {
            "selector": {"matchLabels": {"app": service(number)}},
            "action": "DENY",
            "rules": [{"to": [{"operation": {"ports": [str(port)]}}]}],
        },
    }


def routes(number: int, size: Size, weight: int) -> Json:
    """The VirtualService of one service."""
    name = service(number)
    to = [("v1", weight), ("v2", 100 - weight)]
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": name, "namespace": space(number, size)},
        "spec": {
            "hosts": [name],
            "http": [
                {"route": [{"destination": {"host": name, "subset": v}, "weight": w} for v, w in to]},
            ],
        },
    }


def _first(size: Size) -> Iterable[Json]:
    for number in range(size.namespaces):
        labels = {"mycel.io/mesh": "enabled"}
        yield _object("v1", "Namespace", space(number, size), labels=labels)
    for number in range(size.nodes):
        yield _object(
            "v1", "Node", _node(number), labels={"topology.kubernetes.io/zone": f"zone-{number % 3}"}
        )


def _second(size: Size) -> Iterable[Json]:
    for number in range(size.services):
        name, namespace = service(number), space(number, size)
        yield _object("v1", "ServiceAccount", name, namespace)
        yield _object(
            "v1",
            "Service",
            name,
            namespace,
            spec={
                "clusterIP": f"10.96.{1 + number // 250}.{number % 250 + 1}",
                "selector": {"app": name},
                "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
            },
        )
        subsets = [{"name": v, "labels": {"version": v}} for v in ("v1", "v2")]
        spec = {"host": name, "subsets": subsets}
        yield _object("networking.istio.io/v1", "DestinationRule", name, namespace, spec=spec)
        yield routes(number, size, 50)


def _object(
    version: str, kind: str, name: str, namespace: str = "", labels: Json | None = None, **rest: Any
) -> Json:
    metadata: Json = {"name": name, **({"namespace": namespace} if namespace else {})}
    if labels:
        metadata["labels"] = labels
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **rest}


def _node(number: int) -> str:
    return f"node-{number:03d}"


def _own_pod(node: int, component: str) -> Json:
    spec = _pod_spec(_node(node), f"mycel-{component}")
    return _object("v1", "Pod", f"mycel-{component}-{node:03d}", NAMESPACE, spec=spec)


def _pod(number: int, replica: int, index: int, size: Size) -> Json:
    name = service(number)
    labels = {"app": name, "version": f"v{1 + replica % 2}", "pod-template-hash": "6d5c9f7b8"}
    made = _object("v1", "Pod", pod_name(number, replica), space(number, size), labels)
    made["metadata"]["ownerReferences"] = [
        {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": f"{name}-6d5c9f7b8", "uid": f"{index}"}
    ]
    made["spec"] = _pod_spec(_node(index % size.nodes), name)
    return made


def _pod_spec(node: str, account: str) -> Json:
    """With about as much in it as pods have: what the controller does not keep costs it too."""
    environment = [{"name": f"SETTING_{n}", "value": f"value-{n}"} for n in range(12)]
    container = {
        "name": "main",
        "image": "registry.example.org/team/application:1.2.3",
        "ports": [{"name": "http", "containerPort": 8080}],
        "env": environment,
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}},
        "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}},
    }
    return {
        "nodeName": node,
        "serviceAccountName": account,
        "automountServiceAccountToken": False,
        "containers": [container],
    }


async def _status(client: Client, namespace: str, name: str, address: str, ready: bool) -> None:
    state = "True" if ready else "False"
    status = {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "hostIP": "192.0.2.1",
        "conditions": [
            {"type": "Initialized", "status": "True"},
            {"type": "ContainersReady", "status": state},
            {"type": "Ready", "status": state},
            {"type": "PodScheduled", "status": "True"},
        ],
    }
    await client.patch(
        path_of("v1", "pods", namespace, name, "status"),
        {"status": status},
        content_type="application/merge-patch+json",
    )


_PLURALS = {
    "Namespace": "namespaces",
    "Node": "nodes",
    "ServiceAccount": "serviceaccounts",
    "Service": "services",
    "DestinationRule": "destinationrules",
    "VirtualService": "virtualservices",
    "AuthorizationPolicy": "authorizationpolicies",
}


def path(o: Json, name: str = "") -> str:
    """Where an object's kind is found at the API server, or the object."""
    return path_of(o["apiVersion"], _PLURALS[o["kind"]], o["metadata"].get("namespace", ""), name)


async def _all(client: Client, objects: Iterable[Json]) -> None:
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(o: Json) -> None:
        async with slots:
            await client.create(path(o), o)

    await asyncio.gather(*(one(o) for o in objects))
