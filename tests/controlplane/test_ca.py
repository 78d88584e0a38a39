"""The certificate authority: what it signs, for whom, and what it refuses."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store

from common import spiffe
from controlplane import api
from controlplane.ca.authority import (
    Authority,
    AuthorityError,
    RequestError,
    Root,
    load_authority,
    open_authority,
)
from controlplane.credentials import Caller, FolderCredentials
from controlplane.server import ServerCertificate
from tests.controlplane.support import TOKENS, Harness, bearer, mesh_namespace, pod, write

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
WEB = spiffe.parse("spiffe://cluster.local/ns/default/sa/web")


def request(key: Any = None, *names: x509.GeneralName, algorithm: Any = hashes.SHA256()) -> bytes:  # noqa: B008
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ignored")])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return open_authority(tmp_path / "ca", NOW)


def test_a_workload_certificate(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    issued = authority.issue_workload(request(key), WEB, NOW)
    leaf = x509.load_der_x509_certificate(issued.certificate)
    (root,) = (x509.load_der_x509_certificate(r) for r in authority.roots)
    assert leaf.public_key() == key.public_key()
    assert leaf.not_valid_before_utc == NOW - timedelta(minutes=5)
    assert leaf.not_valid_after_utc == NOW + timedelta(hours=24) == issued.not_after
    assert not list(leaf.subject), "the subject that was asked for is nobody's business"
    extensions = {type(e.value): e for e in leaf.extensions}
    san = extensions[x509.SubjectAlternativeName]
    assert san.critical
    assert [n.value for n in san.value] == [str(WEB)]
    assert extensions[x509.BasicConstraints].value == x509.BasicConstraints(ca=False, path_length=None)
    usage = extensions[x509.KeyUsage].value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    assert list(extensions[x509.ExtendedKeyUsage].value) == [
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    ]
    leaf.verify_directly_issued_by(root)
    verified = PolicyBuilder().store(Store([root])).time(NOW).build_client_verifier().verify(leaf, [])
    assert verified.subjects is not None
    assert [s.value for s in verified.subjects] == [str(WEB)]


def test_serial_numbers_never_repeat(authority: Authority) -> None:
    csr = request()
    assert len({authority.issue_workload(csr, WEB, NOW).serial for _ in range(50)}) == 50


def test_no_certificate_outlives_the_root(authority: Authority) -> None:
    late = NOW + timedelta(days=3649, hours=12)
    assert authority.issue_workload(request(), WEB, late).not_after == NOW + timedelta(days=3650)


def test_the_right_name_may_be_asked_for(authority: Authority) -> None:
    authority.issue_workload(request(None, x509.UniformResourceIdentifier(str(WEB))), WEB, NOW)


@pytest.mark.parametrize(
    "name",
    [
        x509.UniformResourceIdentifier("spiffe://cluster.local/ns/default/sa/other"),
        x509.UniformResourceIdentifier("spiffe://other.domain/ns/default/sa/web"),
        x509.DNSName("web.default.svc"),
    ],
)
def test_other_names_are_refused(authority: Authority, name: x509.GeneralName) -> None:
    with pytest.raises(RequestError, match="asks for") as e:
        authority.issue_workload(request(None, name), WEB, NOW)
    assert e.value.forbidden
    with pytest.raises(RequestError):
        authority.issue_workload(request(None, x509.UniformResourceIdentifier(str(WEB)), name), WEB, NOW)


@pytest.mark.parametrize(
    "names", [b"\x30\x02\xa3\x00", b"\x30\x02\xa5\x00", b"\x30\x80", b"\x30\x02\x86\x05"]
)
def test_names_that_cannot_be_read_are_refused(authority: Authority, names: bytes) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    extension = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, names)
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(extension, False)
    with pytest.raises(RequestError):
        authority.issue_workload(
            csr.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER), WEB, NOW
        )


@pytest.mark.parametrize(
    ("key", "algorithm", "accepted"),
    [
        (ec.generate_private_key(ec.SECP384R1()), hashes.SHA256(), True),
        (ed25519.Ed25519PrivateKey.generate(), None, True),
        (rsa.generate_private_key(65537, 2048), hashes.SHA256(), True),
        (rsa.generate_private_key(65537, 1024), hashes.SHA256(), False),
        (ec.generate_private_key(ec.SECP256K1()), hashes.SHA256(), False),
        (dsa.generate_private_key(2048), hashes.SHA256(), False),
    ],
)
def test_which_keys(authority: Authority, key: Any, algorithm: Any, accepted: bool) -> None:
    csr = request(key, algorithm=algorithm)
    if accepted:
        authority.issue_workload(csr, WEB, NOW)
    else:
        with pytest.raises(RequestError, match="none of"):
            authority.issue_workload(csr, WEB, NOW)


def test_what_is_no_request_is_refused(authority: Authority) -> None:
    good = request()
    for length in range(len(good)):
        with pytest.raises(RequestError):
            authority.issue_workload(good[:length], WEB, NOW)
    with pytest.raises(RequestError, match="not signed"):
        authority.issue_workload(good[:-1] + bytes([good[-1] ^ 1]), WEB, NOW)


def test_the_root_survives_a_restart(tmp_path: Path, authority: Authority) -> None:
    assert open_authority(tmp_path / "ca", NOW + timedelta(days=1)).roots == authority.roots
    assert {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "ca").iterdir()} == {
        "root.key": 0o600,
        "root.pem": 0o600,
    }


def test_a_broken_root_is_never_replaced(tmp_path: Path) -> None:
    folder, other = tmp_path / "ca", tmp_path / "other"
    open_authority(folder, NOW)
    open_authority(other, NOW)
    key = (folder / "root.key").read_bytes()
    with pytest.raises(AuthorityError, match="ended"):
        open_authority(folder, NOW + timedelta(days=4000))
    (folder / "root.key").chmod(0o644)
    with pytest.raises(AuthorityError, match="others may read"):
        open_authority(folder, NOW)
    (folder / "root.key").write_bytes((other / "root.key").read_bytes())
    with pytest.raises(AuthorityError, match="not the key"):
        open_authority(folder, NOW)
    (folder / "root.key").unlink()
    with pytest.raises(AuthorityError, match="cannot be read"):
        open_authority(folder, NOW)
    (folder / "root.key").write_bytes(key)
    (folder / "root.pem").unlink()
    with pytest.raises(AuthorityError, match="cannot be read"):
        open_authority(folder, NOW)


def made_elsewhere(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> Root:
    """A root as another tool makes it, without a key identifier."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "theirs")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Root(private, certificate.public_bytes(pem))


def test_a_root_that_was_made_elsewhere() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    authority = load_authority(made_elsewhere(key), "here", NOW)
    leaf = x509.load_der_x509_certificate(authority.issue_workload(request(), WEB, NOW).certificate)
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    found = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert found.key_identifier == own.digest
    with pytest.raises(AuthorityError, match=r"^here: root.key is no key for ECDSA"):
        load_authority(made_elsewhere(rsa.generate_private_key(65537, 2048)), "here", NOW)


def test_the_servers_certificate_is_renewed(authority: Authority) -> None:
    now = [NOW]
    certificate = ServerCertificate(authority, ("127.0.0.1", "name.test", "::1"), lambda: now[0])
    assert certificate.fetch() is None
    now[0] += timedelta(days=15, seconds=1)
    assert certificate.fetch() is not None
    assert certificate.fetch() is None


# -- over gRPC ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def serving(harness: Harness) -> AsyncIterator[Harness]:
    ended = pod("ended", "10.1.0.3", uid="uid-ended")
    ended["status"]["phase"] = "Succeeded"
    node_network = pod("host", "192.0.2.1", "node-a", uid="uid-host")
    node_network["spec"]["hostNetwork"] = True
    write(
        harness.config,
        "pods.yaml",
        mesh_namespace(),
        pod("a", "10.1.0.1", "node-a", "web", uid="uid-a"),
        pod("b", "10.2.0.1", "node-b", "web", uid="uid-b"),
        pod("new", node="node-a", uid="uid-new", ready=False),
        ended,
        node_network,
        pod("proxy", "192.0.2.1", "node-a", "kube-proxy", ns="kube-system", uid="uid-system"),
    )
    async with harness.serving():
        yield harness


def _call(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary(api.METHOD_SIGN)


async def sign(harness: Harness, uid: str, csr: bytes, metadata: Any = None) -> api.SignResponse:
    async with harness.channel() as channel:
        call: Any = channel.unary_unary(api.METHOD_SIGN)
        data = await call(
            api.encode(api.SignRequest(uid, csr)), metadata=metadata or bearer("node-a"), timeout=5
        )
        return api.decode_sign_response(data)


async def refused(
    harness: Harness, uid: str, csr: bytes, metadata: Any = None
) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await sign(harness, uid, csr, metadata)
    return e.value.code(), e.value.details() or ""


async def test_sign(serving: Harness) -> None:
    response = await sign(serving, "uid-a", request())
    (leaf,) = (x509.load_der_x509_certificate(c) for c in response.chain)
    (root,) = (x509.load_der_x509_certificate(r) for r in response.roots)
    leaf.verify_directly_issued_by(root)
    san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [n.value for n in san] == ["spiffe://cluster.local/ns/default/sa/web"]
    assert response.not_after == int(leaf.not_valid_after_utc.timestamp())
    assert root.public_bytes(serialization.Encoding.PEM) == (serving.state / "roots.pem").read_bytes()
    await sign(serving, "uid-new", request())


async def test_sign_refuses(serving: Harness) -> None:
    denied, invalid = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT
    for uid in ("uid-b", "uid-ended", "uid-nobody", ""):
        code, reason = await refused(serving, uid, request())
        assert (code, reason) == (denied, f"no live pod of UID {uid} on node node-a"), uid
    for uid in ("uid-host", "uid-system"):
        assert await refused(serving, uid, request()) == (
            denied,
            f"the pod of UID {uid} is never in the mesh",
        )
    other = x509.UniformResourceIdentifier("spiffe://cluster.local/ns/default/sa/admin")
    assert (await refused(serving, "uid-a", request(None, other)))[0] is denied
    assert (await refused(serving, "uid-a", b"\x30\x00"))[0] is invalid
    async with serving.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await _call(channel)(b"\xc1", metadata=bearer("node-a"))
        assert e.value.code() is invalid
    metrics = await serving.page("/metrics")
    assert 'mycel_ca_requests_refused_total{code="PERMISSION_DENIED"} 7.0' in metrics
    assert 'mycel_ca_requests_refused_total{code="INVALID_ARGUMENT"} 2.0' in metrics


async def test_a_pod_that_is_gone_gets_nothing_more(serving: Harness) -> None:
    await sign(serving, "uid-a", request())
    (serving.config / "pods.yaml").unlink()
    for _ in range(100):
        if not serving.controller.snapshot.workloads:
            break
        await asyncio.sleep(0.02)
    assert (await refused(serving, "uid-a", request()))[0] is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    "metadata",
    [
        (("x", "y"),),
        (("authorization", "Bearer wrong"),),
        (("authorization", "Bearer "),),
        (("authorization", "token-of-node-a"),),
        (("authorization", "Basic token-of-node-a"),),
        (("authorization", "Bearer token-of-node-a"), ("authorization", "Bearer token-of-node-a")),
    ],
)
async def test_strangers_get_nothing(serving: Harness, metadata: Any) -> None:
    assert (await refused(serving, "uid-a", request(), metadata))[0] is grpc.StatusCode.UNAUTHENTICATED


async def test_a_credential_may_be_withdrawn_and_made(serving: Harness) -> None:
    (serving.credentials / "node-a").write_text(hashlib.sha256(b"another token").hexdigest())
    assert (await refused(serving, "uid-a", request()))[0] is grpc.StatusCode.UNAUTHENTICATED
    await sign(serving, "uid-a", request(), (("authorization", "Bearer another token"),))
    os.unlink(serving.credentials / "node-a")
    code, _ = await refused(serving, "uid-a", request(), (("authorization", "Bearer another token"),))
    assert code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_token_of_two_nodes_is_good_for_none(serving: Harness) -> None:
    digest = (serving.credentials / "node-a").read_text()
    assert await FolderCredentials(serving.credentials).caller(TOKENS["node-a"]) == Caller("node-a")
    (serving.credentials / "node-c").write_text(digest)
    assert await FolderCredentials(serving.credentials).caller(TOKENS["node-a"]) is None
    assert await FolderCredentials(serving.credentials).caller(TOKENS["node-b"]) == Caller("node-b")


async def test_the_server_proves_itself(serving: Harness, tmp_path: Path) -> None:
    stranger = open_authority(tmp_path / "stranger", NOW).roots_pem.encode()
    async with serving.channel(stranger) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await _call(channel)(b"", metadata=bearer("node-a"), timeout=3)
    assert e.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_plain_text_gets_nothing(serving: Harness) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{serving.controller.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await _call(channel)(b"", metadata=bearer("node-a"), timeout=3)
    assert e.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
