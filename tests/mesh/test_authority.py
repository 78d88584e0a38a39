"""The controller's CA: a node gets certificates for pods that live on it, and for nothing else."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from lab import Lab, Pod

pytestmark = pytest.mark.privileged

NAMESPACE = "authority"

#: Asks the CA from a node, as its node proxy would. Arguments: controller, roots, credential, UID, URI of the CSR or nothing.
SCRIPT = textwrap.dedent(
    """
    import datetime, sys, grpc
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives import hashes, serialization
    from controlplane.api import METHOD_SIGN, SignRequest, decode_sign_response, encode
    controller, roots, credential, uid, uri = sys.argv[1:]
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if uri:
        csr = csr.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), True)
    csr = csr.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    channel = grpc.secure_channel(controller, grpc.ssl_channel_credentials(open(roots, "rb").read()))
    try:
        data = channel.unary_unary(METHOD_SIGN)(
            encode(SignRequest(uid, csr.public_bytes(serialization.Encoding.DER))), timeout=5,
            metadata=[("authorization", "Bearer " + credential)])
    except grpc.RpcError as error:
        print(error.code().name, error.details())
    else:
        answer = decode_sign_response(data)
        leaf = x509.load_der_x509_certificate(answer.chain[0])
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        back = datetime.datetime.now(datetime.timezone.utc) - leaf.not_valid_before_utc
        life = leaf.not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)
        print("SIGNED", *names.get_values_for_type(x509.UniformResourceIdentifier), int(back.total_seconds()),
              int(life.total_seconds()))
    """
)


def ask(lab: Lab, node: str, uid: str, *, credential: str | None = None, uri: str = "") -> str:
    place = lab.node(node)
    token = (place.folder / "credential").read_text().strip() if credential is None else credential
    done = place.run(
        [sys.executable, "-c", SCRIPT, "10.99.0.1:15012", str(lab.roots), token, uid, uri], timeout=20
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def pod(lab: Lab) -> Pod:
    lab.namespace(NAMESPACE)
    return lab.pod("someone", node="node1", namespace=NAMESPACE, service_account="someone")


def test_own_pod_is_signed_with_its_name_and_a_past_start(lab: Lab, pod: Pod):
    word, name, back, life = ask(lab, "node1", pod.uid).split()
    assert word == "SIGNED"
    assert name == f"spiffe://cluster.local/ns/{NAMESPACE}/sa/someone"
    assert 290 <= int(back) <= 330
    assert 23 * 3600 < int(life) <= 24 * 3600


def test_pod_of_another_node_is_refused(lab: Lab, pod: Pod):
    assert ask(lab, "node2", pod.uid).startswith("PERMISSION_DENIED")


def test_unknown_pod_is_refused(lab: Lab):
    assert ask(lab, "node1", "00000000-0000-0000-0000-000000000000").startswith("PERMISSION_DENIED")


def test_pod_that_is_gone_is_refused(lab: Lab):
    gone = lab.pod("gone", node="node1", namespace=NAMESPACE)
    assert ask(lab, "node1", gone.uid).startswith("SIGNED")
    gone.delete()
    lab.settle()
    assert ask(lab, "node1", gone.uid).startswith("PERMISSION_DENIED")


def test_another_name_in_the_csr_is_refused(lab: Lab, pod: Pod):
    answer = ask(lab, "node1", pod.uid, uri="spiffe://cluster.local/ns/kube-system/sa/admin")
    assert answer.startswith("PERMISSION_DENIED")


@pytest.mark.parametrize("credential", ["", "wrong", "a" * 43])
def test_wrong_credential_is_refused(lab: Lab, pod: Pod, credential: str):
    assert ask(lab, "node1", pod.uid, credential=credential).startswith("UNAUTHENTICATED")


def test_keys_are_nowhere_on_the_node(lab: Lab, pod: Pod):
    for node in lab.nodes:
        for folder in (node.root / "run/mycel", node.root / "var/lib/mycel"):
            for path in folder.rglob("*"):
                if path.is_file():
                    assert b"PRIVATE KEY" not in path.read_bytes(), path


def test_the_authority_s_key_is_its_own(lab: Lab):
    folder = lab.roots.parent
    private = [path for path in folder.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert private
    for path in private:
        assert Path(path).stat().st_mode & 0o077 == 0
