"""A certificate authority in memory that signs what it is told, also what no real one should."""

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from controlplane.api import SignRequest, SignResponse
from nodeproxy.tls import Svid, Trust

MINUTE = 60.0
DAY = 86400.0


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


class Authority:
    def __init__(self, name: str = "root", trust_domain: str = "cluster.local") -> None:
        self.trust_domain = trust_domain
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(self._name, self._key.public_key(), -5 * MINUTE, DAY)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.root = builder.sign(self._key, hashes.SHA256())

    @property
    def pem(self) -> str:
        return self.root.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def trust(self) -> Trust:
        return Trust(self.trust_domain, (self.root,))

    def _builder(self, subject, key, begin: float, end: float) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_moment(begin))
            .not_valid_after(_moment(end))
        )

    def certificate(
        self, key: ec.EllipticCurvePublicKey, *uris: str, begin: float = -5 * MINUTE, end: float = DAY
    ) -> x509.Certificate:
        """:param begin: and ``end``: seconds from now."""
        builder = self._builder(x509.Name([]), key, begin, end)
        if uris:
            names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
            builder = builder.add_extension(names, critical=True)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        return builder.sign(self._key, hashes.SHA256())

    def svid(self, identity: str, begin: float = -5 * MINUTE, end: float = DAY) -> Svid:
        key = ec.generate_private_key(ec.SECP256R1())
        return Svid(identity, key, (self.certificate(key.public_key(), identity, begin=begin, end=end),))

    def answer(
        self, request: SignRequest, identity: str, begin: float = -5 * MINUTE, end: float = DAY
    ) -> SignResponse:
        """What the controller would answer, for any identity."""
        key = x509.load_der_x509_csr(request.csr).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        certificate = self.certificate(key, identity, begin=begin, end=end)
        der = serialization.Encoding.DER
        return SignResponse(
            (certificate.public_bytes(der),),
            (self.root.public_bytes(der),),
            int(certificate.not_valid_after_utc.timestamp()),
        )
