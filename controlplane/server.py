"""The gRPC server on port 15012: TLS with a certificate of the mesh's own CA, and the services behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric import ec

from common import logs
from common.channels import SERVER_OPTIONS
from controlplane import api
from controlplane.ca.authority import SERVER_LIFETIME, Authority, pem_of, private_pem, utc_now
from controlplane.ca.service import CertificateService
from controlplane.stream.service import MeshService
from controlplane.xds.service import METHOD, METHOD_DELTA, SERVICE, DiscoveryService

_log = logs.get(__name__)

#: Messages may be large (a whole mesh in one update); idle streams are kept alive through NAT and noticed when dead.
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", 16 << 20),
    *SERVER_OPTIONS,
    ("grpc.so_reuseport", 0),
)


class ServerCertificate:
    """The controller's certificate, made anew in memory when half of its life is over."""

    def __init__(
        self, authority: Authority, names: Sequence[str], clock: Callable[[], datetime] = utc_now
    ) -> None:
        self._authority = authority
        self._names = tuple(names)
        self._clock = clock
        self._renew_at: datetime
        self._current = self._make()

    def credentials(self) -> grpc.ServerCredentials:
        """TLS for a server; each handshake asks for a newer certificate."""
        return grpc.dynamic_ssl_server_credentials(
            self._current,
            self.fetch,  # type: ignore[arg-type]  # None is allowed: no newer one
            require_client_authentication=False,
        )

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """A new certificate if it is time for one, else None (keep the old one)."""
        if self._clock() < self._renew_at:
            return None
        self._current = self._make()
        _log.info("server certificate renewed", names=self._names)
        return self._current

    def _make(self) -> grpc.ServerCertificateConfiguration:
        now = self._clock()
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self._authority.issue_server(key.public_key(), self._names, now)
        lifetime: timedelta = min(SERVER_LIFETIME, issued.not_after - now)
        self._renew_at = now + lifetime / 2
        return grpc.ssl_server_certificate_configuration([(private_pem(key), pem_of(issued.certificate))])


def make_server(
    address: str,
    certificate: ServerCertificate,
    mesh: MeshService,
    certificates: CertificateService,
    discovery: DiscoveryService,
) -> tuple[grpc.aio.Server, int]:
    """A server that is bound (``ADDRESS:PORT``) and not yet started, and its port.

    :raises OSError: the address cannot be bound.
    """
    server = grpc.aio.server(options=_OPTIONS)
    mesh_service, subscribe = _split(api.METHOD_SUBSCRIBE)
    ca_service, sign = _split(api.METHOD_SIGN)
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                mesh_service, {subscribe: grpc.stream_stream_rpc_method_handler(mesh.subscribe)}
            ),
            grpc.method_handlers_generic_handler(
                ca_service, {sign: grpc.unary_unary_rpc_method_handler(certificates.sign)}
            ),
            grpc.method_handlers_generic_handler(
                SERVICE,
                {
                    METHOD: grpc.stream_stream_rpc_method_handler(discovery.stream),
                    METHOD_DELTA: grpc.stream_stream_rpc_method_handler(discovery.delta),
                },
            ),
        )
    )
    try:
        port = server.add_secure_port(address, certificate.credentials())
    except RuntimeError as e:
        raise OSError(f"{address} cannot be bound: {e}") from e
    if port == 0:
        raise OSError(f"{address} cannot be bound")
    return server, port


def _split(method: str) -> tuple[str, str]:
    _, service, name = method.split("/")
    return service, name
