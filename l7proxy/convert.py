"""xDS resources (Envoy v3 protos) to :mod:`l7proxy.model`: listeners, clusters, endpoint assignments.

Owns the checks: a resource is converted completely or refused with the field and the reason; nothing here is live. Fields
that change what a request may do and are not supported are refused, not skipped; fields that only tune what this proxy
does anyway are ignored. Routes are in :mod:`l7proxy.convert_routes`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import base_pb2, health_check_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from google.protobuf import struct_pb2

from l7proxy import model
from l7proxy.convert_routes import route_table, seconds
from l7proxy.errors import ConversionError

HCM_TYPE = (
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
)
ROUTER_TYPE = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
#: Namespace of endpoint metadata that says which workload is behind an address.
METADATA = "mycel"

_POLICIES = {
    cluster_pb2.Cluster.ROUND_ROBIN: model.LbPolicy.ROUND_ROBIN,
    cluster_pb2.Cluster.RANDOM: model.LbPolicy.RANDOM,
    cluster_pb2.Cluster.LEAST_REQUEST: model.LbPolicy.LEAST_REQUEST,
}
_HEALTHY = frozenset({health_check_pb2.UNKNOWN, health_check_pb2.HEALTHY, health_check_pb2.DEGRADED})


def listener(message: listener_pb2.Listener) -> model.Listener:
    """:raises ConversionError: see the module."""
    if not message.name:
        raise ConversionError("name: empty")
    chains = [_filter_chain(chain, f"filter_chains[{i}]") for i, chain in enumerate(message.filter_chains)]
    if message.HasField("default_filter_chain"):
        raise ConversionError("default_filter_chain: not supported")
    seen: set[tuple[object, int]] = set()
    for found in (chain for group in chains for chain in group):
        key = (found.prefix, found.port)
        if key in seen:
            raise ConversionError(f"filter_chains: two chains for {found.prefix} port {found.port}")
        seen.add(key)
    return model.Listener(message.name, tuple(chain for group in chains for chain in group))


def _filter_chain(message: listener_components_pb2.FilterChain, at: str) -> list[model.FilterChain]:
    match = message.filter_chain_match
    for name in (
        "server_names",
        "application_protocols",
        "source_prefix_ranges",
        "source_ports",
        "direct_source_prefix_ranges",
    ):
        if getattr(match, name):
            raise ConversionError(f"{at}.filter_chain_match.{name}: not supported")
    if match.transport_protocol not in ("", "raw_buffer"):
        raise ConversionError(
            f"{at}.filter_chain_match.transport_protocol: {match.transport_protocol!r} is not supported"
        )
    if len(message.filters) != 1 or message.filters[0].typed_config.type_url != HCM_TYPE:
        raise ConversionError(f"{at}.filters: exactly one HttpConnectionManager is supported")
    manager = http_connection_manager_pb2.HttpConnectionManager()
    if not message.filters[0].typed_config.Unpack(manager):
        raise ConversionError(f"{at}.filters[0].typed_config: not an HttpConnectionManager")
    http = _manager(manager, f"{at}.filters[0]")
    port = match.destination_port.value
    prefixes: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    for i, prefix in enumerate(match.prefix_ranges):
        try:
            prefixes.append(
                ipaddress.ip_network(f"{prefix.address_prefix}/{prefix.prefix_len.value}", strict=False)
            )
        except ValueError as error:
            raise ConversionError(f"{at}.filter_chain_match.prefix_ranges[{i}]: {error}") from None
    if not prefixes:
        prefixes = [ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")]
    return [model.FilterChain(prefix, port, http, message.name) for prefix in prefixes]


def _manager(message: http_connection_manager_pb2.HttpConnectionManager, at: str) -> model.HttpManager:
    kind = message.WhichOneof("route_specifier")
    inline = None
    if kind == "rds":
        route_name = message.rds.route_config_name
        if not route_name:
            raise ConversionError(f"{at}.rds.route_config_name: empty")
    elif kind == "route_config":
        inline = route_table(message.route_config)
        route_name = inline.name
    else:
        raise ConversionError(f"{at}.route_specifier: {kind} is not supported")
    for i, http_filter in enumerate(message.http_filters):
        if (
            http_filter.typed_config.type_url != ROUTER_TYPE
            and not http_filter.is_optional
            and not http_filter.disabled
        ):
            raise ConversionError(
                f"{at}.http_filters[{i}]: {http_filter.name} ({http_filter.typed_config.type_url}) is not supported"
            )
    upgrades = {
        u.upgrade_type.lower()
        for u in message.upgrade_configs
        if not u.HasField("enabled") or u.enabled.value
    }
    defaults = model.HttpManager(route_name)
    options = message.common_http_protocol_options
    return model.HttpManager(
        route_name=route_name,
        inline=inline,
        use_remote_address=message.use_remote_address.value,
        skip_xff_append=message.skip_xff_append,
        generate_request_id=message.generate_request_id.value
        if message.HasField("generate_request_id")
        else True,
        normalize_path=message.normalize_path.value,
        merge_slashes=message.merge_slashes,
        stream_idle_timeout=(
            seconds(message.stream_idle_timeout)
            if message.HasField("stream_idle_timeout")
            else defaults.stream_idle_timeout
        ),
        request_headers_timeout=seconds(message.request_headers_timeout),
        idle_timeout=seconds(options.idle_timeout)
        if options.HasField("idle_timeout")
        else defaults.idle_timeout,
        upgrades=frozenset(upgrades) or defaults.upgrades,
    )


def cluster(message: cluster_pb2.Cluster) -> tuple[model.Cluster, tuple[model.Endpoint, ...] | None]:
    """The cluster, and its endpoints if they stand in it (STATIC).

    :raises ConversionError: see the module.
    """
    if not message.name:
        raise ConversionError("name: empty")
    policy = _POLICIES.get(message.lb_policy)
    if policy is None:
        raise ConversionError(
            f"lb_policy: {cluster_pb2.Cluster.LbPolicy.Name(message.lb_policy)} is not supported"
        )
    inline: tuple[model.Endpoint, ...] | None = None
    if message.type == cluster_pb2.Cluster.EDS:
        eds_name = message.eds_cluster_config.service_name or message.name
    elif message.type == cluster_pb2.Cluster.STATIC:
        eds_name = message.name
        assignment = endpoint_pb2.ClusterLoadAssignment()
        assignment.CopyFrom(message.load_assignment)
        assignment.cluster_name = message.name
        inline = endpoints(assignment)
    else:
        raise ConversionError(
            f"type: {cluster_pb2.Cluster.DiscoveryType.Name(message.type)} is not supported"
        )
    connect_timeout = seconds(message.connect_timeout) if message.HasField("connect_timeout") else 5.0
    if connect_timeout <= 0:
        raise ConversionError("connect_timeout: must be more than 0")
    connections, pending = 1024, 1024
    for threshold in message.circuit_breakers.thresholds:
        if threshold.priority == base_pb2.DEFAULT:
            connections = (
                threshold.max_connections.value if threshold.HasField("max_connections") else connections
            )
            pending = (
                threshold.max_pending_requests.value
                if threshold.HasField("max_pending_requests")
                else pending
            )
    parts = message.name.split("|")
    service = parts[3] if len(parts) == 4 else message.name
    labels = service.split(".")
    kubernetes = len(labels) >= 3 and labels[2] == "svc"
    return (
        model.Cluster(
            name=message.name,
            service=service,
            service_name=labels[0] if kubernetes else service,
            service_namespace=labels[1] if kubernetes else "unknown",
            eds_name=eds_name,
            lb_policy=policy,
            connect_timeout=connect_timeout,
            max_connections=connections,
            max_pending_requests=pending,
        ),
        inline,
    )


def endpoints(message: endpoint_pb2.ClusterLoadAssignment) -> tuple[model.Endpoint, ...]:
    """The healthy endpoints of the most preferred priority that has any; weights of localities are multiplied in.

    :raises ConversionError: see the module.
    """
    if not message.cluster_name:
        raise ConversionError("cluster_name: empty")
    by_priority: dict[int, list[model.Endpoint]] = {}
    for i, locality in enumerate(message.endpoints):
        weight = locality.load_balancing_weight.value or 1
        found = by_priority.setdefault(locality.priority, [])
        for j, item in enumerate(locality.lb_endpoints):
            at = f"endpoints[{i}].lb_endpoints[{j}]"
            if item.health_status not in _HEALTHY:
                continue
            address = item.endpoint.address.socket_address
            if not item.endpoint.address.HasField("socket_address"):
                raise ConversionError(f"{at}.endpoint.address: only socket_address is supported")
            try:
                ip = str(ipaddress.ip_address(address.address))
            except ValueError as error:
                raise ConversionError(f"{at}.endpoint.address: {error}") from None
            if not 0 < address.port_value < 65536:
                raise ConversionError(f"{at}.endpoint.address.port_value: {address.port_value}")
            total = weight * (item.load_balancing_weight.value or 1)
            found.append(_endpoint(ip, address.port_value, total, item.metadata.filter_metadata, at))
    for priority in sorted(by_priority):
        if by_priority[priority]:
            return tuple(by_priority[priority])
    return ()


def _endpoint(
    ip: str, port: int, weight: int, metadata: Mapping[str, struct_pb2.Struct], at: str
) -> model.Endpoint:
    said = metadata[METADATA].fields if METADATA in metadata else {}

    def text(name: str, default: str = "") -> str:
        value = said.get(name)
        return (value.string_value or default) if value is not None else default

    enrolled = said.get("enrolled")
    is_enrolled = enrolled is not None and (enrolled.bool_value or enrolled.string_value == "true")
    if is_enrolled and not text("node"):
        raise ConversionError(f"{at}.metadata.{METADATA}.node: an enrolled endpoint without its node")
    return model.Endpoint(
        address=ip,
        port=port,
        uid=text("uid"),
        name=text("name"),
        namespace=text("namespace"),
        workload=text("workload", "unknown"),
        service_account=text("service_account"),
        identity=text("identity"),
        node=text("node"),
        enrolled=is_enrolled,
        app=text("app", "unknown"),
        version=text("version", "unknown"),
        weight=weight,
    )
