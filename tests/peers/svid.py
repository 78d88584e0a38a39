"""Gets a workload's SVID from the mesh's CA as a node proxy does; run on the machine that poses as the pod's node.

``python -m tests.peers.svid CONTROLLER ROOTS CREDENTIAL POD-UID FOLDER`` writes ``chain.pem``, ``key.pem`` and ``roots.pem``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from controlplane.api import METHOD_SIGN, SignRequest, SignResponse, decode_sign_response, encode


def main() -> None:
    controller, roots, credential, uid, folder = sys.argv[1:]
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    request = SignRequest(uid, csr.public_bytes(serialization.Encoding.DER))
    response = sign(controller, Path(roots), Path(credential).read_text().strip(), request)
    out = Path(folder)
    (out / "chain.pem").write_bytes(_pem(response.chain))
    (out / "roots.pem").write_bytes(_pem(response.roots))
    (out / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def sign(controller: str, roots: Path, token: str, request: SignRequest) -> SignResponse:
    """One call of the CA. :raises grpc.RpcError: it refuses."""
    credentials = grpc.ssl_channel_credentials(roots.read_bytes())
    with grpc.secure_channel(controller, credentials) as channel:
        call = channel.unary_unary(
            METHOD_SIGN, request_serializer=encode, response_deserializer=decode_sign_response
        )
        response: SignResponse = call(request, metadata=(("authorization", f"Bearer {token}"),), timeout=10)
        return response


def _pem(certificates: tuple[bytes, ...]) -> bytes:
    loaded = (x509.load_der_x509_certificate(der) for der in certificates)
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in loaded)


if __name__ == "__main__":
    main()
