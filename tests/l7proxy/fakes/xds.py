"""Resources as the controller sends them, in the shape of the contract between both."""

from __future__ import annotations

from typing import Any

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2  # noqa: F401 - registers the type for ParseDict
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2  # noqa: F401
from google.protobuf import any_pb2, json_format
from google.protobuf.message import Message

from l7proxy import resources

HOST = "web-app.default.svc.cluster.local"
VIP = "10.96.0.10"
PORT = 80
ROUTE_NAME = f"{HOST}:{PORT}"
HCM = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"


def _parse(document: dict[str, Any], message: Message) -> Message:
    json_format.ParseDict(document, message)
    return message


def cluster_name(subset: str = "", port: int = PORT) -> str:
    return f"outbound|{port}|{subset}|{HOST}"


def listener(*, vip: str = VIP, port: int = PORT, route: str = ROUTE_NAME, **manager: Any) -> Message:
    chain = {
        "filter_chain_match": {
            "prefix_ranges": [{"address_prefix": vip, "prefix_len": 32}],
            "destination_port": port,
        },
        "filters": [
            {
                "name": "envoy.filters.network.http_connection_manager",
                "typed_config": {
                    "@type": HCM,
                    "stat_prefix": "outbound",
                    "rds": {
                        "route_config_name": route,
                        "config_source": {"ads": {}, "resource_api_version": "V3"},
                    },
                    "http_filters": [
                        {"name": "envoy.filters.http.router", "typed_config": {"@type": ROUTER}}
                    ],
                    **manager,
                },
            }
        ],
    }
    document = {
        "name": "outbound-l7",
        "address": {"pipe": {"path": "/run/mycel/nodeproxy/envoy.sock"}},
        "filter_chains": [chain],
    }
    return _parse(document, listener_pb2.Listener())


def routes(*items: dict[str, Any], name: str = ROUTE_NAME, **virtual_host: Any) -> Message:
    found = list(items) or [{"match": {"prefix": "/"}, "route": {"cluster": cluster_name(), "timeout": "0s"}}]
    host = {"name": "all", "domains": ["*"], "routes": found, **virtual_host}
    return _parse({"name": name, "virtual_hosts": [host]}, route_pb2.RouteConfiguration())


def cluster(subset: str = "", **fields: Any) -> Message:
    document = {
        "name": cluster_name(subset),
        "type": "EDS",
        "eds_cluster_config": {"eds_config": {"ads": {}, "resource_api_version": "V3"}},
        "connect_timeout": "2s",
        **fields,
    }
    return _parse(document, cluster_pb2.Cluster())


def endpoint(
    port: int, *, address: str = "127.0.0.1", node: str = "node-a", enrolled: bool = True, **metadata: str
) -> dict[str, Any]:
    said = {
        "uid": f"uid-{port}",
        "name": f"web-{port}",
        "namespace": "default",
        "workload": "web-app",
        "service_account": "web",
        "identity": "spiffe://cluster.local/ns/default/sa/web",
        "node": node,
        "enrolled": enrolled,
        "app": "web-app",
        "version": "v1",
        **metadata,
    }
    return {
        "endpoint": {"address": {"socket_address": {"address": address, "port_value": port}}},
        "metadata": {"filter_metadata": {"mycel": said}},
    }


def assignment(*endpoints: dict[str, Any], subset: str = "") -> Message:
    document = {"cluster_name": cluster_name(subset), "endpoints": [{"lb_endpoints": list(endpoints)}]}
    return _parse(document, endpoint_pb2.ClusterLoadAssignment())


def pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def kind_of(message: Message) -> str:
    return "type.googleapis.com/" + message.DESCRIPTOR.full_name


def apply(target: resources.Resources, *messages: Message, version: str = "1") -> list[str]:
    """Give resources to l7proxy as one response of each type, in the order of dependence."""
    errors: list[str] = []
    for kind in resources.TYPES:
        found = [pack(m) for m in messages if kind_of(m) == kind]
        if found:
            errors += target.apply(kind, version, found)
    return errors
