"""The webhook's certificate: issued by the mesh's root, in memory only, replaced when half of its life is over."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from cryptography.hazmat.primitives.asymmetric import ec

from common import logs
from controlplane.ca.authority import SERVER_LIFETIME, Authority, pem_of, private_pem, utc_now

_log = logs.get(__name__)


class WebhookCertificate:
    """A server's TLS context; call :meth:`renew` now and then. Connections that are open keep what they have."""

    def __init__(
        self, authority: Authority, names: Sequence[str], clock: Callable[[], datetime] = utc_now
    ) -> None:
        self._authority = authority
        self._names = tuple(names)
        self._clock = clock
        self._renew_at: datetime
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self._load()

    def renew(self) -> bool:
        """Another certificate for connections from now on, if it is time; whether it was."""
        if self._clock() < self._renew_at:
            return False
        self._load()
        _log.info("webhook's certificate renewed", names=self._names)
        return True

    def _load(self) -> None:
        now = self._clock()
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self._authority.issue_server(key.public_key(), self._names, now)
        lifetime: timedelta = min(SERVER_LIFETIME, issued.not_after - now)
        self._renew_at = now + lifetime / 2
        # OpenSSL reads files only. This one is in memory and has no name anywhere.
        fd = os.memfd_create("webhook", os.MFD_CLOEXEC)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(private_pem(key) + pem_of(issued.certificate))
            self.context.load_cert_chain(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
