"""Bootstrap of a real Envoy that takes l7proxy's place on a node.

It gets everything by ADS from the same controller, proves itself with the node's credential, and is handed its connections
by the node proxy through a unix socket. What it needs of the node: to run in the cgroup that the agent knows as Envoy's
(``mycel-agent --envoy-cgroup``), and a node proxy that hands over (``mycel-nodeproxy --envoy SOCKET``).
"""

from __future__ import annotations

import ipaddress
import json
import os
from pathlib import Path
from typing import Any

Json = dict[str, Any]

_CONTROLLER = "mycel-controller"
_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
_HTTP = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def bootstrap(
    *,
    node: str,
    controller: tuple[str, int],
    roots: str,
    credential: str,
    socket: str,
    admin: tuple[str, int],
) -> Json:
    """Envoy's ``--config-path`` as JSON.

    :param controller: name or IP address, and port; the certificate has to be of this name or address.
    :param roots: path of the PEM bundle that the controller's certificate chains to.
    :param credential: the node's token. It stands in the result, which therefore is a secret too.
    :param socket: the unix socket on which Envoy is to listen.
    """
    host, port = controller
    return {
        "node": {
            "id": f"envoy~{node}",
            "cluster": "mycel",
            "metadata": {"NODE_NAME": node, "ENVOY_SOCKET": socket},
        },
        "admin": {"address": _address(*admin)},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": True,
                "grpc_services": [
                    {
                        "envoy_grpc": {"cluster_name": _CONTROLLER},
                        "initial_metadata": [
                            {"key": "authorization", "value": f"Bearer {credential.strip()}"}
                        ],
                    }
                ],
            },
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
        },
        "static_resources": {
            "clusters": [
                {
                    "name": _CONTROLLER,
                    "type": "STATIC" if _is_address(host) else "STRICT_DNS",
                    "connect_timeout": "5s",
                    "load_assignment": {
                        "cluster_name": _CONTROLLER,
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(host, port)}}]}],
                    },
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": _HTTP,
                            "explicit_http_config": {
                                "http2_protocol_options": {
                                    # A controller that vanished is noticed, and another connection is tried.
                                    "connection_keepalive": {"interval": "10s", "timeout": "5s"}
                                }
                            },
                        }
                    },
                    "transport_socket": {
                        "name": "envoy.transport_sockets.tls",
                        "typed_config": {
                            "@type": _TLS,
                            **({} if _is_address(host) else {"sni": host}),
                            "common_tls_context": {
                                # As a client Envoy speaks 1.2 at most unless it is told.
                                "tls_params": {
                                    "tls_minimum_protocol_version": "TLSv1_3",
                                    "tls_maximum_protocol_version": "TLSv1_3",
                                },
                                "validation_context": {
                                    "trusted_ca": {"filename": roots},
                                    "match_typed_subject_alt_names": [
                                        {
                                            "san_type": "IP_ADDRESS" if _is_address(host) else "DNS",
                                            "matcher": {"exact": host},
                                        }
                                    ],
                                },
                            },
                        },
                    },
                }
            ]
        },
    }


def split_address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` (IPv6 in brackets) as host and port. :raises ValueError: it is no such text."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is no HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def write(bootstrap: Json, path: Path) -> None:
    """Replace the file, readable by its owner only from its first byte on."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(bootstrap, file, indent=1)
    temporary.replace(path)


def _address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
