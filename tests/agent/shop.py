"""A small mesh of two nodes: a shop with a server on each, clients on the first, and a pod outside."""

from __future__ import annotations

from typing import Any

from agent.mesh import Mesh, apply
from controlplane.api import (
    Action,
    Authorization,
    Endpoint,
    MeshConfig,
    NodeInfo,
    Operation,
    Resource,
    Rule,
    Service,
    ServicePort,
    Source,
    Update,
    Workload,
)

ADDRESSES = {
    "client": "10.244.1.5",
    "other": "10.244.1.6",
    "server": "10.244.1.7",
    "stranger": "10.244.1.8",
    "far": "10.244.2.7",
}
VIP, L7, HEADLESS = "10.96.0.1", "10.96.0.2", ""
PORT = 9000
OUTSIDE = "192.0.2.9"


def workload(name: str, *, node: str = "n1", **more: Any) -> Workload:
    return Workload(
        uid=f"uid-{name}",
        namespace="shop",
        name=name,
        service_account=name,
        node=node,
        identity=f"spiffe://cluster.local/ns/shop/sa/{name}",
        addresses=(ADDRESSES[name],),
        enrolled=more.pop("enrolled", True),
        ready=True,
        workload_name=name,
        **more,
    )


def service(name: str, address: str, *, l7: bool = False, **more: Any) -> Service:
    ends = tuple(
        Endpoint(f"uid-{pod}", ADDRESSES[pod], PORT, node) for pod, node in (("server", "n1"), ("far", "n2"))
    )
    ports = (
        ServicePort(80, "web", "TCP", l7=l7, endpoints=ends, node_port=30080 if not l7 else 0),
        ServicePort(53, "dns", "UDP", endpoints=ends),
    )
    return Service(
        "shop", name, f"{name}.shop.svc.cluster.local", (address,) if address else (), ports, **more
    )


def mesh(*more: Resource, **of_server: Any) -> Mesh:
    of_client = {
        key.removeprefix("client_"): of_server.pop(key) for key in list(of_server) if "client_" in key
    }
    resources: tuple[Resource, ...] = (
        MeshConfig(nodes=(NodeInfo("n1", ("10.99.0.11",)), NodeInfo("n2", ("10.99.0.12",)))),
        workload("client", groups=("clients",), **of_client),
        workload("other"),
        workload("server", **of_server),
        workload("stranger", enrolled=False),
        workload("far", node="n2"),
        service("web", VIP),
        service("routed", L7, l7=True),
        service("headless", HEADLESS),
        *more,
    )
    state, errors = apply(Mesh(), Update(nonce=1, version="v1", complete=True, upserts=resources))
    assert errors == ()
    return state


def policy(
    name: str, action: Action, *principals: str, ports: tuple[int, ...] = (), **source: Any
) -> Authorization:
    names = tuple(f"cluster.local/ns/shop/sa/{p}" for p in principals)
    sources = (Source(principals=names, **source),) if names or source else ()
    operations = (Operation(ports=ports),) if ports else ()
    return Authorization("shop", name, action, (Rule(sources, operations),))
