"""A self-signed root and what it signs. Keys are ECDSA P-256, in files that only the controller can read.

A cluster's root is :mod:`controlplane.ca.secret`'s.
Certificates are as the SPIFFE X.509-SVID document asks: one URI SAN, not a CA, digital signature, for client and server.
Time is an argument everywhere.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common import spiffe

#: Certificates are valid this long before they are made: clocks differ.
BACKDATE = timedelta(minutes=5)
WORKLOAD_LIFETIME = timedelta(hours=24)
SERVER_LIFETIME = timedelta(days=30)
_ROOT_LIFETIME = timedelta(days=3650)


class AuthorityError(Exception):
    """The authority's files are broken or do not belong together; nothing is made anew in their place."""


class RequestError(Exception):
    """A certificate signing request that is not acceptable. ``forbidden``: it asks for names that are not the caller's."""

    def __init__(self, reason: str, forbidden: bool = False) -> None:
        super().__init__(reason)
        self.forbidden = forbidden


@dataclass(frozen=True, slots=True)
class Issued:
    """A leaf certificate (DER) and when it ends."""

    certificate: bytes
    not_after: datetime
    serial: int


@dataclass(frozen=True, slots=True)
class Root:
    """A root's private key and certificate, both PEM."""

    key: bytes
    certificate: bytes


class Authority:
    """The root in memory. Make it with :func:`open_authority`."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, root: x509.Certificate) -> None:
        self._key = key
        self._root = root

    @property
    def roots(self) -> tuple[bytes, ...]:
        """DER of every root that peers' certificates may chain to."""
        return (self._root.public_bytes(serialization.Encoding.DER),)

    @property
    def roots_pem(self) -> str:
        return self._root.public_bytes(serialization.Encoding.PEM).decode()

    def issue_workload(self, csr: bytes, identity: spiffe.SpiffeId, now: datetime) -> Issued:
        """A certificate for the key in a PKCS#10 request (DER); all else in it is decided here.

        :raises RequestError: the request is malformed, not signed by its key, has a weak key, or asks for other names.
        """
        request = _parse(csr)
        _check_names(request, identity)
        san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))])
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        # RFC 5280, 4.2.1.6: the SAN is critical where the subject is empty.
        return self._issue(
            request.public_key(), x509.Name([]), san, usages, WORKLOAD_LIFETIME, now, critical_san=True
        )

    def issue_server(self, key: CertificatePublicKeyTypes, names: Sequence[str], now: datetime) -> Issued:
        """The controller's own certificate, for DNS names and IP addresses."""
        san = x509.SubjectAlternativeName([_general_name(n) for n in names])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mycel-controlplane")])
        return self._issue(key, subject, san, [ExtendedKeyUsageOID.SERVER_AUTH], SERVER_LIFETIME, now)

    def _issue(
        self,
        key: CertificatePublicKeyTypes,
        subject: x509.Name,
        san: x509.SubjectAlternativeName,
        usages: list[x509.ObjectIdentifier],
        lifetime: timedelta,
        now: datetime,
        critical_san: bool = False,
    ) -> Issued:
        not_after = min(now + lifetime, self._root.not_valid_after_utc)
        serial = x509.random_serial_number()
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._root.subject)
            .public_key(key)
            .serial_number(serial)
            .not_valid_before(max(now - BACKDATE, self._root.not_valid_before_utc))
            .not_valid_after(not_after)
            .add_extension(san, critical=critical_san)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(_authority_key_identifier(self._root), critical=False)
        )
        certificate = builder.sign(self._key, hashes.SHA256())
        return Issued(certificate.public_bytes(serialization.Encoding.DER), not_after, serial)


def open_authority(folder: Path, now: datetime) -> Authority:
    """The authority whose root lies in ``folder`` (``root.key``, ``root.pem``); made if the folder has neither.

    :raises AuthorityError: one of both is missing or broken, they are no pair, or the root has ended.
    """
    root = read_root(folder, now)
    if root is None:
        root = make_root(now)
        keep_root(folder, root)
    return load_authority(root, str(folder), now)


def read_root(folder: Path, now: datetime) -> Root | None:
    """The root in ``folder``, if there is one.

    :raises AuthorityError: as :func:`open_authority`.
    """
    key_path, root_path = folder / "root.key", folder / "root.pem"
    if not key_path.exists() and not root_path.exists():
        return None
    try:
        root = Root(key_path.read_bytes(), root_path.read_bytes())
        mode = key_path.stat().st_mode
    except OSError as e:
        raise AuthorityError(f"{folder}: the root cannot be read: {e}") from e
    load_authority(root, str(folder), now)
    if mode & 0o077:
        raise AuthorityError(f"{key_path}: others may read it; chmod 600, and think about who did")
    return root


def load_authority(root: Root, where: str, now: datetime) -> Authority:
    """The authority of a root; ``where`` says in errors where it comes from.

    :raises AuthorityError: it is broken, key and certificate are no pair, it may not sign, or has ended.
    """
    try:
        key = serialization.load_pem_private_key(root.key, None)
        certificate = x509.load_pem_x509_certificate(root.certificate)
        is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, TypeError, x509.ExtensionNotFound, UnsupportedAlgorithm) as e:
        raise AuthorityError(f"{where}: the root cannot be read: {e}") from e
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuthorityError(f"{where}: root.key is no key for ECDSA, the only kind that is taken")
    if key.public_key() != certificate.public_key():
        raise AuthorityError(f"{where}: root.key is not the key of root.pem")
    if not is_ca:
        raise AuthorityError(f"{where}: root.pem is no certificate of an authority")
    if certificate.not_valid_after_utc <= now:
        raise AuthorityError(f"{where}: the root ended on {certificate.not_valid_after_utc:%Y-%m-%d}")
    return Authority(key, certificate)


def make_root(now: datetime) -> Root:
    """A new root."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Mycel"),
            x509.NameAttribute(NameOID.COMMON_NAME, "Mycel root"),
        ]
    )
    root = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + _ROOT_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(signature=False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Root(private_pem(key), root.public_bytes(serialization.Encoding.PEM))


def keep_root(folder: Path, root: Root) -> None:
    """Write a root to where :func:`open_authority` finds it.

    :raises OSError: it cannot be written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The key first: with the certificate only, a start that was cut off is noticed; with the key only, likewise.
    write_private(folder / "root.key", root.key)
    write_private(folder / "root.pem", root.certificate)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, on disk before it has its name."""
    temporary = path.with_name(path.name + ".new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def pem_of(certificate: bytes) -> bytes:
    """DER to PEM."""
    return x509.load_der_x509_certificate(certificate).public_bytes(serialization.Encoding.PEM)


def utc_now() -> datetime:
    return datetime.now(UTC)


def _parse(csr: bytes) -> x509.CertificateSigningRequest:
    try:
        request = x509.load_der_x509_csr(csr)
        key = request.public_key()
        signed = request.is_signature_valid
    except Exception as e:  # cryptography raises many types for what a stranger may send
        raise RequestError(f"is no PKCS#10 request: {e}") from e
    if not signed:
        raise RequestError("is not signed by the key that it holds")
    strong = (
        (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, (ec.SECP256R1, ec.SECP384R1)))
        or (isinstance(key, rsa.RSAPublicKey) and 2048 <= key.key_size <= 8192)
        or isinstance(key, ed25519.Ed25519PublicKey)
    )
    if not strong:
        raise RequestError("its key is none of ECDSA P-256, P-384, RSA of 2048 bits or more, Ed25519")
    return request


def _check_names(request: x509.CertificateSigningRequest, identity: spiffe.SpiffeId) -> None:
    try:
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as e:
        raise RequestError(f"its extensions cannot be read: {e}") from e
    for name in names:
        if not isinstance(name, x509.UniformResourceIdentifier) or name.value != str(identity):
            raise RequestError(f"asks for {name.value}, but the workload is {identity}", forbidden=True)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(signature: bool) -> x509.KeyUsage:
    """For a leaf (``signature``) or for a CA."""
    return x509.KeyUsage(
        digital_signature=signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=not signature,
        crl_sign=not signature,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_key_identifier(root: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        own = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        # A root made elsewhere may have none; then it is the key's hash (RFC 5280, 4.2.1.2).
        own = x509.SubjectKeyIdentifier.from_public_key(root.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)
