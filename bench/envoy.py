"""Envoy as the benchmark meets it: static configuration, certificates and its command line.

Every Envoy here is what a sidecar is: one worker, a file access log in the default format and statistics on. TLS is
1.3 only, both ends present and verify a P-256 certificate by its SPIFFE URI (the cheapest handshake that Envoy offers
by default).
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Json = dict[str, Any]

#: Ports of the Envoys' own listeners in the pods (no-mesh lab only, so they are free to choose).
HTTP_HOP = 16001
TCP_CLIENT = 16002
HTTP_CLIENT = 16003
TCP_SERVER = 16008
HTTP_SERVER = 16009
ADMIN = 16900

_TYPE = "type.googleapis.com/envoy.extensions."


@dataclass(frozen=True, slots=True)
class Identity:
    """Paths of one end's certificate, key and trusted roots; ``peer`` is the SPIFFE ID that the other end must have."""

    chain: Path
    key: Path
    roots: Path
    peer: str


def binary() -> str:
    """The Envoy of the package index that the development environment holds."""
    return str(files("envoy") / "_bin" / "envoy")


def command(config: Path) -> list[str]:
    return [
        binary(), "--config-path", str(config), "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning",
    ]  # fmt: skip


def client_config(*, same_node: str, other_node: str, port: int, identity: Identity, log: Path) -> Json:
    """Envoy in the client's pod: an HTTP hop to ``same_node``, and the near ends of both mTLS pairs to ``other_node``.

    :param port: the application's own port on the same node.
    """
    tls = _client_tls(identity)
    return _bootstrap(
        listeners=[
            _listener(HTTP_HOP, [http_filter("hop", log)]),
            _listener(TCP_CLIENT, [tcp_filter("tcp", log)]),
            _listener(HTTP_CLIENT, [http_filter("http", log)]),
        ],
        clusters=[
            cluster("hop", same_node, port),
            cluster("tcp", other_node, TCP_SERVER, tls),
            cluster("http", other_node, HTTP_SERVER, tls),
        ],
    )


def server_config(*, port: int, identity: Identity, log: Path) -> Json:
    """Envoy in the server's pod: the far ends of both mTLS pairs, to the application on the pod's loopback."""
    tls = _server_tls(identity)
    return _bootstrap(
        listeners=[
            _listener(TCP_SERVER, [tcp_filter("app", log)], tls),
            _listener(HTTP_SERVER, [http_filter("app", log)], tls),
        ],
        clusters=[cluster("app", "127.0.0.1", port)],
    )


def write(config: Json, path: Path) -> Path:
    path.write_text(json.dumps(config, indent=1))
    return path


def cluster(name: str, address: str, port: int, transport: Json | None = None) -> Json:
    endpoint = {"endpoint": {"address": {"socket_address": {"address": address, "port_value": port}}}}
    made: Json = {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        # Envoy's default of 1024 would cut into the largest runs' connections and retries.
        "circuit_breakers": {
            "thresholds": [{"max_connections": 8192, "max_pending_requests": 8192, "max_requests": 8192}]
        },
    }
    if transport is not None:
        made["transport_socket"] = transport
    return made


def tcp_filter(cluster_name: str, log: Path) -> Json:
    return {
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": f"{_TYPE}filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": cluster_name,
            "cluster": cluster_name,
            "access_log": access_log(log),
        },
    }


def http_filter(cluster_name: str, log: Path) -> Json:
    router = {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": f"{_TYPE}filters.http.router.v3.Router"},
    }
    route = {"match": {"prefix": "/"}, "route": {"cluster": cluster_name}}
    return {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": f"{_TYPE}filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": cluster_name,
            "access_log": access_log(log),
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
            "http_filters": [router],
        },
    }


def access_log(path: Path) -> list[Json]:
    return [
        {
            "name": "envoy.access_loggers.file",
            "typed_config": {"@type": f"{_TYPE}access_loggers.file.v3.FileAccessLog", "path": str(path)},
        }
    ]


def _listener(port: int, filters: list[Json], transport: Json | None = None) -> Json:
    chain: Json = {"filters": filters}
    if transport is not None:
        chain["transport_socket"] = transport
    address = {"socket_address": {"address": "0.0.0.0", "port_value": port}}
    return {"name": str(port), "address": address, "filter_chains": [chain]}


def _bootstrap(*, listeners: list[Json], clusters: list[Json]) -> Json:
    return {
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": ADMIN}}},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }


def _client_tls(identity: Identity) -> Json:
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{_TYPE}transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": common_tls(identity),
        },
    }


def _server_tls(identity: Identity) -> Json:
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{_TYPE}transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": True,
            "common_tls_context": common_tls(identity),
        },
    }


def common_tls(identity: Identity, *, alpn: tuple[str, ...] = ()) -> Json:
    made: Json = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {
                "certificate_chain": {"filename": str(identity.chain)},
                "private_key": {"filename": str(identity.key)},
            }
        ],
        "validation_context": {
            "trusted_ca": {"filename": str(identity.roots)},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": identity.peer}}],
        },
    }
    if alpn:
        made["alpn_protocols"] = list(alpn)
    return made


def make_identities(folder: Path) -> tuple[Identity, Identity]:
    """A root of the benchmark's own, and certificates for the client's and the server's end, written into ``folder``."""
    names = ("spiffe://bench.local/ns/default/sa/client", "spiffe://bench.local/ns/default/sa/server")
    root_key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark root")])
    root = _certificate(subject, subject, root_key.public_key(), root_key, None)
    (folder / "roots.pem").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    for name in names:
        end = name.rsplit("/", 1)[1]
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = _certificate(x509.Name([]), subject, key.public_key(), root_key, name)
        (folder / f"{end}.pem").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
        (folder / f"{end}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    client, server = (
        Identity(folder / f"{end}.pem", folder / f"{end}.key", folder / "roots.pem", peer)
        for end, peer in (("client", names[1]), ("server", names[0]))
    )
    return client, server


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePrivateKey,
    uri: str | None,
) -> x509.Certificate:
    """A root (no URI) or a leaf, valid for a day."""
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=uri is None, path_length=None), critical=True)
    )
    if uri is not None:
        name = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        builder = builder.add_extension(name, critical=True)
    return builder.sign(signer, hashes.SHA256())
