"""The workload certificates of this node's pods: one key per pod UID, in memory only.

Owns when a certificate is asked for, checked, renewed (at half of what it has left when it comes) and given up. A pod whose
certificate is not there yet makes its connections wait (:meth:`Certificates.wait`), never go without.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common import logs
from controlplane.api import SignRequest, SignResponse
from nodeproxy.loop import Loop, Timer
from nodeproxy.tls import Credentials, PeerIdentityError, Svid, Trust, credentials, identity_of, load_chain

_log = logs.get(__name__)

#: Seconds between attempts after the controller refused or did not answer.
RETRY_FIRST, RETRY_MOST = 0.3, 15.0
#: Seconds that a new connection waits for its pod's certificate.
PATIENCE = 10.0

Waiter = Callable[[Credentials | None], None]


class Signer(Protocol):
    def __call__(self, request: SignRequest, done: Callable[[SignResponse | str], None], /) -> None: ...


class _Entry:
    def __init__(self, uid: str, identity: str) -> None:
        self.uid = uid
        self.identity = identity
        self.svid: Svid | None = None
        self.ready: Credentials | None = None
        self.timer: Timer | None = None
        self.retry = RETRY_FIRST
        self.asking = 0  #: number of the request under way, 0 for none
        self.waiters: list[tuple[Waiter, Timer]] = []


class Certificates:
    def __init__(
        self,
        loop: Loop,
        sign: Signer,
        trust: Callable[[], Trust | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """:param clock: seconds since the epoch."""
        self._loop = loop
        self._sign = sign
        self._trust = trust
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._requests = 0

    def enroll(self, uid: str, identity: str) -> None:
        """A pod of this identity is on the node; the same again changes nothing."""
        entry = self._entries.get(uid)
        if entry is not None and entry.identity == identity:
            return
        if entry is not None:
            self.forget(uid)
        entry = self._entries[uid] = _Entry(uid, identity)
        self._request(entry)

    def forget(self, uid: str) -> None:
        """The pod is gone: its key too."""
        entry = self._entries.pop(uid, None)
        if entry is None:
            return
        if entry.timer:
            entry.timer.cancel()
        for waiter, timer in entry.waiters:
            timer.cancel()
            waiter(None)

    def get(self, uid: str) -> Credentials | None:
        """The pod's credentials under what is trusted now; None if it has none, or only expired ones."""
        entry = self._entries.get(uid)
        trust = self._trust()
        if entry is None or entry.svid is None or trust is None or entry.svid.not_after <= self._clock():
            return None
        if entry.ready is None or entry.ready.trust is not trust:
            entry.ready = credentials(entry.svid, trust)
        return entry.ready

    def wait(self, uid: str, callback: Waiter, patience: float = PATIENCE) -> None:
        """Call back with the credentials as soon as they are there (maybe now), or None after ``patience`` seconds."""
        ready = self.get(uid)
        entry = self._entries.get(uid)
        if ready is not None or entry is None:
            callback(ready)
            return
        item: tuple[Waiter, Timer]

        def too_late() -> None:
            entry.waiters.remove(item)
            callback(None)

        item = (callback, self._loop.later(patience, too_late))
        entry.waiters.append(item)

    def wake(self) -> None:
        """What is trusted has changed: some who wait may go on."""
        for entry in list(self._entries.values()):
            if entry.waiters and (ready := self.get(entry.uid)) is not None:
                waiters, entry.waiters = entry.waiters, []
                for waiter, timer in waiters:
                    timer.cancel()
                    waiter(ready)

    def states(self) -> dict[str, object]:
        """For the debug page: no keys."""
        return {
            entry.uid: {
                "identity": entry.identity,
                "not_after": entry.svid.not_after if entry.svid else None,
                "usable": self.get(entry.uid) is not None,
            }
            for entry in list(self._entries.values())
        }

    def _request(self, entry: _Entry) -> None:
        if self._entries.get(entry.uid) is not entry:
            return
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(entry.identity)])
        builder = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(names, critical=True)
        csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
        self._requests += 1
        number = entry.asking = self._requests

        def done(result: SignResponse | str) -> None:
            if entry.asking == number and self._entries.get(entry.uid) is entry:
                entry.asking = 0
                self._answered(entry, key, result)

        self._sign(SignRequest(entry.uid, csr), done)

    def _answered(self, entry: _Entry, key: ec.EllipticCurvePrivateKey, result: SignResponse | str) -> None:
        try:
            if isinstance(result, str):
                raise PeerIdentityError(result)
            svid = self._check(entry, key, result)
        except (PeerIdentityError, ValueError) as error:
            _log.warning("no certificate", uid=entry.uid, identity=entry.identity, reason=str(error))
            delay = entry.retry * random.uniform(0.8, 1.2)
            entry.retry = min(entry.retry * 2, RETRY_MOST)
            entry.timer = self._loop.later(delay, lambda: self._request(entry))
            return
        entry.svid = svid
        entry.ready = None
        entry.retry = RETRY_FIRST
        renew = max(1.0, (svid.not_after - self._clock()) / 2)
        entry.timer = self._loop.later(renew, lambda: self._request(entry))
        _log.info("certificate", uid=entry.uid, identity=entry.identity, renew_in=int(renew))
        self.wake()

    def _check(self, entry: _Entry, key: ec.EllipticCurvePrivateKey, response: SignResponse) -> Svid:
        chain = load_chain(response.chain)
        if not chain:
            raise ValueError("the controller sent no certificate")
        if chain[0].public_key() != key.public_key():
            raise ValueError("the certificate is of another key")
        identity = str(identity_of(chain[0]))
        if identity != entry.identity:
            raise ValueError(f"the certificate is of {identity}")
        svid = Svid(entry.identity, key, chain)
        if svid.not_after <= self._clock():
            raise ValueError("the certificate has expired")
        return svid
