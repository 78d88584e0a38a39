"""Envoy that speaks HBONE: configuration of a client (TCP in, CONNECT out) and of a server (CONNECT in, TCP out).

What is configured here is the contract that the node proxy keeps too: HTTP/2 CONNECT over mutual TLS 1.3 with ALPN ``h2``,
``:authority`` = the destination's address and port, to the destination's address at port 15008.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.envoy import Identity, common_tls

Json = dict[str, Any]

_TYPE = "type.googleapis.com/envoy.extensions."


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    def json(self) -> Json:
        return {"socket_address": {"address": self.host, "port_value": self.port}}

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def client_config(
    *, listen: Address, hbone: Address, authority: str, identity: Identity, admin: Address, source: str = ""
) -> Json:
    """Each TCP connection to ``listen`` becomes a CONNECT stream for ``authority`` through ``hbone``.

    :param source: the local address that Envoy dials from; empty leaves it to the kernel.
    """
    tcp = {
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": f"{_TYPE}filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "hbone",
            "cluster": "hbone",
            "tunneling_config": {"hostname": authority},
        },
    }
    tls = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{_TYPE}transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": common_tls(identity, alpn=("h2",)),
        },
    }
    cluster: Json = {
        "name": "hbone",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": _assignment("hbone", hbone),
        "transport_socket": tls,
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPE}upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
    }
    if source:
        cluster["upstream_bind_config"] = {"source_address": {"address": source, "port_value": 0}}
    return _bootstrap(
        admin, {"name": "in", "address": listen.json(), "filter_chains": [{"filters": [tcp]}]}, cluster
    )


def server_config(
    *, listen: Address, application: Address, identity: Identity, admin: Address, log: Path
) -> Json:
    """CONNECT streams to ``listen`` end at ``application``; ``log`` gets one line for each (:authority, status, client)."""
    hcm = {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": f"{_TYPE}filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "hbone",
            "codec_type": "HTTP2",
            "http2_protocol_options": {"allow_connect": True},
            "upgrade_configs": [{"upgrade_type": "CONNECT"}],
            "access_log": [
                {
                    "name": "envoy.access_loggers.file",
                    "typed_config": {
                        "@type": f"{_TYPE}access_loggers.file.v3.FileAccessLog",
                        "path": str(log),
                        "log_format": {
                            "json_format": {
                                "method": "%REQ(:METHOD)%",
                                "authority": "%REQ(:AUTHORITY)%",
                                "status": "%RESPONSE_CODE%",
                                "peer": "%DOWNSTREAM_PEER_URI_SAN%",
                                "client": "%DOWNSTREAM_REMOTE_ADDRESS%",
                                "connection": "%CONNECTION_ID%",
                                "tls": "%DOWNSTREAM_TLS_VERSION%",
                                "baggage": "%REQ(BAGGAGE)%",
                                "forwarded": "%REQ(FORWARDED)%",
                            }
                        },
                    },
                }
            ],
            "route_config": {
                "virtual_hosts": [
                    {
                        "name": "all",
                        "domains": ["*"],
                        "routes": [
                            {
                                "match": {"connect_matcher": {}},
                                "route": {
                                    "cluster": "application",
                                    "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
                                },
                            }
                        ],
                    }
                ]
            },
            "http_filters": [
                {
                    "name": "envoy.filters.http.router",
                    "typed_config": {"@type": f"{_TYPE}filters.http.router.v3.Router"},
                }
            ],
        },
    }
    tls = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{_TYPE}transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": True,
            "common_tls_context": common_tls(identity, alpn=("h2",)),
        },
    }
    cluster = {
        "name": "application",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": _assignment("application", application),
    }
    chain = {"filters": [hcm], "transport_socket": tls}
    return _bootstrap(admin, {"name": "hbone", "address": listen.json(), "filter_chains": [chain]}, cluster)


def _assignment(name: str, address: Address) -> Json:
    return {
        "cluster_name": name,
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address.json()}}]}],
    }


def _bootstrap(admin: Address, listener: Json, cluster: Json) -> Json:
    return {
        "admin": {"address": admin.json()},
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
    }
