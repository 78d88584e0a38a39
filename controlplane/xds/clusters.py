"""Clusters and their endpoints as Envoy's types."""

from __future__ import annotations

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import address_pb2, base_pb2, protocol_pb2, proxy_protocol_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.extensions.transport_sockets.proxy_protocol.v3 import upstream_proxy_protocol_pb2
from envoy.extensions.transport_sockets.raw_buffer.v3 import raw_buffer_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from google.protobuf import duration_pb2, struct_pb2, wrappers_pb2

from controlplane.model.routing import Balancing, Cluster, ClusterEndpoint
from controlplane.xds.types import over_ads, pack, struct

_CONNECT_TIMEOUT_S = 10
_BALANCING = {
    Balancing.LEAST_REQUEST: cluster_pb2.Cluster.LEAST_REQUEST,
    Balancing.ROUND_ROBIN: cluster_pb2.Cluster.ROUND_ROBIN,
    Balancing.RANDOM: cluster_pb2.Cluster.RANDOM,
}
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def cluster(c: Cluster) -> cluster_pb2.Cluster:
    """The cluster without its endpoints (they come by EDS)."""
    result = cluster_pb2.Cluster(
        name=c.name,
        type=cluster_pb2.Cluster.EDS,
        eds_cluster_config=cluster_pb2.Cluster.EdsClusterConfig(eds_config=over_ads(), service_name=c.name),
        connect_timeout=duration_pb2.Duration(seconds=_CONNECT_TIMEOUT_S),
        lb_policy=_BALANCING[c.balancing],
        transport_socket=_proxy_protocol(),
        metadata=base_pb2.Metadata(filter_metadata={"istio": _istio(c)}),
    )
    if c.http2:
        options = http_protocol_options_pb2.HttpProtocolOptions()
        options.explicit_http_config.http2_protocol_options.CopyFrom(protocol_pb2.Http2ProtocolOptions())
        result.typed_extension_protocol_options[_HTTP_OPTIONS].CopyFrom(pack(options))
    return result


def endpoints(c: Cluster) -> endpoint_pb2.ClusterLoadAssignment:
    """The cluster's endpoints; none is an answer too."""
    result = endpoint_pb2.ClusterLoadAssignment(cluster_name=c.name)
    if c.endpoints:
        result.endpoints.add().lb_endpoints.extend(_endpoint(e) for e in c.endpoints)
    return result


def _endpoint(e: ClusterEndpoint) -> endpoint_components_pb2.LbEndpoint:
    address = address_pb2.Address(
        socket_address=address_pb2.SocketAddress(address=e.address, port_value=e.port)
    )
    about = {
        "uid": e.uid,
        "name": e.name,
        "namespace": e.namespace,
        "workload": e.workload,
        "service_account": e.service_account,
        "identity": e.identity,
        "node": e.node,
        "enrolled": e.enrolled,
        "app": e.app,
        "version": e.version,
    }
    return endpoint_components_pb2.LbEndpoint(
        endpoint=endpoint_components_pb2.Endpoint(address=address),
        health_status="HEALTHY",
        metadata=base_pb2.Metadata(filter_metadata={"mycel": struct(about)}),
        load_balancing_weight=wrappers_pb2.UInt32Value(value=1),
    )


def _istio(c: Cluster) -> struct_pb2.Struct:
    return struct({"services": [{"host": c.host, "name": c.service, "namespace": c.namespace}]})


def _proxy_protocol() -> base_pb2.TransportSocket:
    """Tell the node proxy who the client is, when a real Envoy dials the endpoints."""
    raw = base_pb2.TransportSocket(
        name="envoy.transport_sockets.raw_buffer", typed_config=pack(raw_buffer_pb2.RawBuffer())
    )
    return base_pb2.TransportSocket(
        name="envoy.transport_sockets.upstream_proxy_protocol",
        typed_config=pack(
            upstream_proxy_protocol_pb2.ProxyProtocolUpstreamTransport(
                config=proxy_protocol_pb2.ProxyProtocolConfig(
                    version=proxy_protocol_pb2.ProxyProtocolConfig.V2
                ),
                transport_socket=raw,
            )
        ),
    )
