"""The listener: a unix socket on which connections arrive with a PROXY header, and a filter chain per service port."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.core.v3 import address_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.extensions.access_loggers.file.v3 import file_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.listener.proxy_protocol.v3 import proxy_protocol_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from google.protobuf import duration_pb2, wrappers_pb2

from controlplane.model.routing import RouteTable
from controlplane.xds.types import over_ads, pack

NAME = "outbound-l7"
#: Where Envoy listens unless its node's metadata says otherwise (``ENVOY_SOCKET``).
DEFAULT_SOCKET = "/run/mycel/nodeproxy/envoy.sock"
_MAX_HEADERS_KB = 60


def listener(
    chains: Iterable[listener_components_pb2.FilterChain], socket: str
) -> listener_pb2.Listener | None:
    """The listener with these chains, or None without any: Envoy refuses one that has no filter chain."""
    found = list(chains)
    return _listener(NAME, found, socket) if found else None


def chain_listener(table: RouteTable) -> listener_pb2.Listener:
    """A listener of one chain: what a client has that is sent listeners by what has changed."""
    return _listener(table.name, [chain(table)], DEFAULT_SOCKET)


def _listener(
    name: str, chains: list[listener_components_pb2.FilterChain], socket: str
) -> listener_pb2.Listener:
    return listener_pb2.Listener(
        name=name,
        address=address_pb2.Address(pipe=address_pb2.Pipe(path=socket)),
        listener_filters=[
            listener_components_pb2.ListenerFilter(
                name="envoy.filters.listener.proxy_protocol",
                typed_config=pack(proxy_protocol_pb2.ProxyProtocol()),
            )
        ],
        filter_chains=chains,
    )


def chain(table: RouteTable) -> listener_components_pb2.FilterChain:
    """The filter chain for connections to a table's service and port."""
    addresses = [ipaddress.ip_address(a) for a in table.addresses]
    ranges = [
        address_pb2.CidrRange(
            address_prefix=str(a), prefix_len=wrappers_pb2.UInt32Value(value=a.max_prefixlen)
        )
        for a in addresses
    ]
    match = listener_components_pb2.FilterChainMatch(
        prefix_ranges=ranges, destination_port=wrappers_pb2.UInt32Value(value=table.port)
    )
    http = listener_components_pb2.Filter(
        name="envoy.filters.network.http_connection_manager", typed_config=pack(_manager(table))
    )
    return listener_components_pb2.FilterChain(name=table.name, filter_chain_match=match, filters=[http])


def _manager(table: RouteTable) -> http_connection_manager_pb2.HttpConnectionManager:
    manager = http_connection_manager_pb2.HttpConnectionManager
    return manager(
        stat_prefix=table.name,
        rds=http_connection_manager_pb2.Rds(route_config_name=table.name, config_source=over_ads()),
        http_filters=[
            http_connection_manager_pb2.HttpFilter(
                name="envoy.filters.http.router", typed_config=pack(router_pb2.Router())
            )
        ],
        access_log=[
            accesslog_pb2.AccessLog(
                name="envoy.access_loggers.file",
                typed_config=pack(file_pb2.FileAccessLog(path="/dev/stdout")),
            )
        ],
        server_header_transformation=manager.PASS_THROUGH,
        use_remote_address=wrappers_pb2.BoolValue(value=False),
        normalize_path=wrappers_pb2.BoolValue(value=True),
        max_request_headers_kb=wrappers_pb2.UInt32Value(value=_MAX_HEADERS_KB),
        # Istio lets streams be idle for ever; its applications rely on it.
        stream_idle_timeout=duration_pb2.Duration(),
        upgrade_configs=[manager.UpgradeConfig(upgrade_type="websocket")],
    )
