"""The controller's client against a gRPC server that a test drives: hello, updates, answers, what stays when it is away."""

import ipaddress
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from controlplane import api
from nodeproxy.controller import Controller
from nodeproxy.loop import Loop
from nodeproxy.mesh import Mesh
from tests.nodeproxy.fakes.authority import Authority
from tests.nodeproxy.fakes.world import identity, wait_until

CREDENTIAL = "token"


class FakeController(grpc.GenericRpcHandler):
    """Serves what is put into ``updates``; keeps what it was told."""

    def __init__(self, authority: Authority, port: int = 0) -> None:
        self.authority = authority
        self.updates: queue.SimpleQueue[api.Update | None] = queue.SimpleQueue()
        self.messages: list[Any] = []
        self.credentials: list[str] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers((self,))
        key, certificate = _server_certificate(authority)
        self.port = self._server.add_secure_port(
            f"127.0.0.1:{port}", grpc.ssl_server_credentials([(key, certificate)])
        )
        self._server.start()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        metadata = dict(details.invocation_metadata or ())
        self.credentials.append(str(metadata.get("authorization", "")))
        if details.method == api.METHOD_SUBSCRIBE:
            return grpc.stream_stream_rpc_method_handler(self._subscribe, api.decode_client, api.encode)
        if details.method == api.METHOD_SIGN:
            return grpc.unary_unary_rpc_method_handler(self._sign, api.decode_sign_request, api.encode)
        return None

    def _subscribe(self, messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[api.Update]:
        def read() -> None:
            try:
                for message in messages:
                    self.messages.append(message)
            except grpc.RpcError:
                pass

        threading.Thread(target=read, daemon=True).start()
        while context.is_active():
            try:
                update = self.updates.get(timeout=0.05)
            except queue.Empty:
                continue
            if update is None:
                return
            yield update

    def _sign(self, request: api.SignRequest, context: grpc.ServicerContext) -> api.SignResponse:
        if request.uid != "uid-client":
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "no such pod")
        return self.authority.answer(request, identity("client"))

    def stop(self) -> None:
        self._server.stop(0).wait(5)


def _server_certificate(authority: Authority) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "controller")])
    builder = x509.CertificateBuilder(
        issuer_name=authority.root.subject,
        subject_name=name,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=authority.root.not_valid_before_utc,
        not_valid_after=authority.root.not_valid_after_utc,
    ).add_extension(
        x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
    )
    certificate = builder.sign(authority._key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    return (
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        certificate.public_bytes(pem),
    )


class Client:
    def __init__(self, port: int, roots: Path, credential: Path) -> None:
        self.loop = Loop()
        self.mesh = Mesh()
        self.controller = Controller(
            f"127.0.0.1:{port}",
            roots=roots,
            credential=credential,
            admin="127.0.0.1:15021",
            post=self.loop.post,
            on_update=self.mesh.apply,
            version=lambda: self.mesh.version,
        )
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()
        self.controller.start()

    def stop(self) -> None:
        self.controller.stop()
        self.loop.stop()
        self._thread.join(5)
        self.loop.shutdown()


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def begin(kind: Any, *arguments: Any) -> Any:
        if kind is Client:
            port, roots = arguments
            (tmp_path / "roots.pem").write_text(roots)
            arguments = (port, tmp_path / "roots.pem", tmp_path / "token")
        made.append(kind(*arguments))
        return made[-1]

    (tmp_path / "token").write_text(f"{CREDENTIAL}\n")
    yield begin
    for one in reversed(made):
        one.stop()


def workload(name: str, **changes: Any) -> api.Workload:
    return api.Workload(
        f"uid-{name}", "default", name, name, "a", identity(name), ("10.0.0.1",), True, **changes
    )


def test_updates_are_applied_and_acknowledged(authority: Authority, start: Callable[..., Any]):
    server = start(FakeController, authority)
    server.updates.put(
        api.Update(1, "v1", True, (api.MeshConfig("cluster.local", authority.pem), workload("client")))
    )
    client = start(Client, server.port, authority.pem)
    wait_until(lambda: api.Ack(1, "v1") in server.messages, "acknowledged")
    assert server.messages[0] == api.Hello("nodeproxy", admin="127.0.0.1:15021")
    assert server.credentials[0] == f"Bearer {CREDENTIAL}"
    assert client.mesh.at("10.0.0.1").uid == "uid-client"
    server.updates.put(
        api.Update(2, "v2", upserts=(api.MeshConfig("cluster.local", "rubbish"), workload("other")))
    )
    wait_until(lambda: len(server.messages) == 3, "answered")
    nack = server.messages[2]
    assert isinstance(nack, api.Nack)
    assert [error.key for error in nack.errors] == ["mesh"]
    assert client.mesh.trust is not None
    assert "uid-other" in client.mesh.workloads
    server.updates.put(api.Update(3, "v3", removes=("workload/uid-other",)))
    wait_until(lambda: api.Ack(3, "v3") in server.messages, "acknowledged")
    assert "uid-other" not in client.mesh.workloads


def test_the_state_stays_and_the_stream_comes_back(authority: Authority, start: Callable[..., Any]):
    first = FakeController(authority)
    update = api.Update(1, "v1", True, (api.MeshConfig("cluster.local", authority.pem), workload("client")))
    first.updates.put(update)
    client = start(Client, first.port, authority.pem)
    wait_until(lambda: first.messages[1:] == [api.Ack(1, "v1")], "acknowledged")
    first.stop()
    wait_until(lambda: not client.controller.connected, "seen")
    assert client.mesh.synced
    assert client.mesh.at("10.0.0.1") is not None
    second = start(FakeController, authority, first.port)
    wait_until(lambda: second.messages, "back", 15)
    assert second.messages[0].version == "v1"


def test_sign(authority: Authority, start: Callable[..., Any], tmp_path: Path):
    server = start(FakeController, authority)
    client = start(Client, server.port, authority.pem)
    results: list[Any] = []
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256())
    der = csr.public_bytes(serialization.Encoding.DER)
    client.controller.sign(api.SignRequest("uid-client", der), results.append)
    wait_until(lambda: results, "signed")
    assert isinstance(results[0], api.SignResponse)
    client.controller.sign(api.SignRequest("uid-other", der), results.append)
    wait_until(lambda: len(results) == 2, "refused")
    assert results[1] == "PERMISSION_DENIED: no such pod"
    # kubelet has put a newer token in its place, and later there is none.
    (tmp_path / "token").write_text("newer")
    client.controller.sign(api.SignRequest("uid-client", der), results.append)
    wait_until(lambda: len(results) == 3, "signed")
    assert server.credentials[-1] == "Bearer newer"
    (tmp_path / "token").unlink()
    client.controller.sign(api.SignRequest("uid-client", der), results.append)
    wait_until(lambda: len(results) == 4, "told")
    assert "No such file" in results[3]


@pytest.mark.parametrize("before", ["another's", ""])
def test_a_controller_of_another_root_is_not_believed(
    authority: Authority, start: Callable[..., Any], tmp_path: Path, before: str
):
    server = start(FakeController, authority)
    server.updates.put(api.Update(1, "v1", True, (api.MeshConfig("cluster.local", authority.pem),)))
    client = start(Client, server.port, before and Authority().pem)
    time.sleep(1.0)
    assert server.credentials == []
    assert not client.mesh.synced
    # The bundle comes late, or its root is another one day.
    (tmp_path / "roots.pem").write_text(authority.pem)
    wait_until(lambda: client.mesh.synced, "believed", 15)
