"""TLS of HBONE: contexts from a workload's certificate, and who the peer is.

Owns the parameters (TLS 1.3 only, ALPN ``h2``, mutual, no resumption; the key exchange is the library's default, which begins
with X25519MLKEM768) and the checks of a peer's X.509-SVID (SPIFFE X509-SVID, sections 3 to 5). Keys live in memory only.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL, crypto
from OpenSSL._util import lib

from common import spiffe

ALPN = b"h2"


class PeerIdentityError(Exception):
    """The peer's certificate does not prove who it has to be."""


@dataclass(frozen=True, slots=True, eq=False)
class Trust:
    """What a peer is verified against. Compared by object: another object means verify again."""

    trust_domain: str
    roots: tuple[x509.Certificate, ...]

    def store(self) -> crypto.X509Store:
        store = crypto.X509Store()
        for root in self.roots:
            store.add_cert(crypto.X509.from_cryptography(root))
        return store


@dataclass(frozen=True, slots=True, eq=False)
class Svid:
    """A workload's own certificate. ``chain`` has the leaf first and no root."""

    identity: str
    key: ec.EllipticCurvePrivateKey
    chain: tuple[x509.Certificate, ...]

    @property
    def not_after(self) -> float:
        """Seconds since the epoch."""
        return self.chain[0].not_valid_after_utc.timestamp()

    @property
    def not_before(self) -> float:
        return self.chain[0].not_valid_before_utc.timestamp()


@dataclass(frozen=True, slots=True, eq=False)
class Credentials:
    """The two contexts of one certificate and one trust."""

    svid: Svid
    trust: Trust
    client: SSL.Context
    server: SSL.Context


def credentials(svid: Svid, trust: Trust) -> Credentials:
    return Credentials(
        svid,
        trust,
        _context(svid, trust, SSL.TLS_CLIENT_METHOD),
        _context(svid, trust, SSL.TLS_SERVER_METHOD),
    )


def _context(svid: Svid, trust: Trust, method: int) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.use_privatekey(svid.key)
    context.use_certificate(svid.chain[0])
    for certificate in svid.chain[1:]:
        context.add_extra_chain_cert(certificate)
    store = context.get_cert_store()
    for root in trust.roots:
        if store is not None:
            store.add_cert(crypto.X509.from_cryptography(root))
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    context.set_verify_depth(5)
    if method == SSL.TLS_SERVER_METHOD:
        context.set_alpn_select_callback(_select)
    else:
        context.set_alpn_protos([ALPN])
    return context


def _select(_connection: SSL.Connection, offered: list[bytes]) -> bytes:
    if ALPN in offered:
        return ALPN
    raise SSL.Error("no h2 among the protocols offered")


@dataclass(slots=True)
class Peer:
    """Who is at the other end of a connection, and by what."""

    identity: spiffe.SpiffeId
    chain: tuple[x509.Certificate, ...]
    verified_by: Trust

    def verify(self, trust: Trust, now: float) -> None:
        """Verify again: validity each time, the chain if what we trust has changed since.

        :param now: seconds since the epoch.
        :raises PeerIdentityError: it is not trusted any more.
        """
        leaf = self.chain[0]
        moment = datetime.datetime.fromtimestamp(now, datetime.UTC)
        if not leaf.not_valid_before_utc <= moment <= leaf.not_valid_after_utc:
            raise PeerIdentityError(
                f"certificate of {self.identity} is valid until {leaf.not_valid_after_utc}"
            )
        if self.verified_by is trust:
            return
        if self.identity.trust_domain != trust.trust_domain:
            raise PeerIdentityError(f"{self.identity} is not of trust domain {trust.trust_domain}")
        rest = [crypto.X509.from_cryptography(c) for c in self.chain[1:]]
        context = crypto.X509StoreContext(trust.store(), crypto.X509.from_cryptography(leaf), rest)
        try:
            context.verify_certificate()
        except crypto.X509StoreContextError as error:
            # What the library leaves in its queue would be taken for an error of the next connection.
            lib.ERR_clear_error()
            raise PeerIdentityError(f"certificate of {self.identity}: {error}") from error
        self.verified_by = trust


def peer_of(connection: SSL.Connection, trust: Trust) -> Peer:
    """The peer of a connection whose handshake is complete (the library has verified chain and validity).

    :raises PeerIdentityError: no certificate, no single SPIFFE ID, another trust domain, or not ``h2``.
    """
    leaf = connection.get_peer_certificate(as_cryptography=True)
    if leaf is None:
        raise PeerIdentityError("no certificate")
    # On the server's side the library leaves the leaf out of the peer's chain.
    sent = connection.get_peer_cert_chain(as_cryptography=True) or []
    chain = [leaf, *(certificate for certificate in sent if certificate != leaf)]
    if connection.get_alpn_proto_negotiated() != ALPN:
        raise PeerIdentityError("ALPN h2 was not negotiated")
    identity = identity_of(leaf)
    if identity.trust_domain != trust.trust_domain:
        raise PeerIdentityError(f"{identity} is not of trust domain {trust.trust_domain}")
    return Peer(identity, tuple(chain), trust)


def identity_of(certificate: x509.Certificate) -> spiffe.SpiffeId:
    """The SPIFFE ID of an X.509-SVID: the only URI of its subject alternative names (X509-SVID, section 2).

    :raises PeerIdentityError: the certificate is none.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError) as error:
        raise PeerIdentityError("certificate without subject alternative names") from error
    if len(uris) != 1:
        raise PeerIdentityError(f"certificate with {len(uris)} URIs, exactly one is an SVID's")
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        if constraints.ca:
            raise PeerIdentityError("a signing certificate is no workload's (X509-SVID, section 5.2)")
    except x509.ExtensionNotFound:
        pass
    try:
        return spiffe.parse(uris[0])
    except spiffe.SpiffeError as error:
        raise PeerIdentityError(f"URI {uris[0]!r}: {error}") from error


def load_roots(pem: str) -> tuple[x509.Certificate, ...]:
    """:raises ValueError: the text is no PEM bundle."""
    return tuple(x509.load_pem_x509_certificates(pem.encode("ascii", "replace")))


def load_chain(der: Sequence[bytes]) -> tuple[x509.Certificate, ...]:
    """:raises ValueError: a part is no certificate."""
    return tuple(x509.load_der_x509_certificate(part) for part in der)
