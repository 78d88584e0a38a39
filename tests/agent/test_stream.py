"""The agent's end of the controller's stream: real gRPC over TLS on loopback, a controller that follows a script."""

import asyncio
import datetime
import ipaddress
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent import stream
from agent.stream import Settings, Stream
from controlplane.api import (
    METHOD_SUBSCRIBE,
    Ack,
    ClientMessage,
    Hello,
    Nack,
    ResourceError,
    Update,
    decode_client,
    encode,
)


def certificate(address: str = "127.0.0.1") -> tuple[bytes, bytes]:
    """A self-signed server certificate: (key, certificate), PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "controller")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return (
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        made.public_bytes(serialization.Encoding.PEM),
    )


class Controller:
    """Sends ``updates`` to whoever connects and writes down what it hears."""

    def __init__(self, key: bytes, chain: bytes) -> None:
        self.updates: list[Update] = []
        self.heard: list[ClientMessage] = []
        self.connections = 0
        self.end = asyncio.Event()
        self._server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(
            self._subscribe, request_deserializer=decode_client, response_serializer=encode
        )
        service, method = METHOD_SUBSCRIBE.strip("/").split("/")
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        self._credentials = grpc.ssl_server_credentials([(key, chain)])

    async def start(self, port: int = 0) -> int:
        bound = self._server.add_secure_port(f"127.0.0.1:{port}", self._credentials)
        await self._server.start()
        return bound

    async def stop(self) -> None:
        self.end.set()
        await self._server.stop(0)

    async def _subscribe(self, requests, context):
        metadata = dict(context.invocation_metadata())
        if metadata.get("authorization") != "Bearer token":
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such credential")
        self.connections += 1
        reader = asyncio.create_task(self._read(requests))
        try:
            for update in self.updates:
                yield update
            await self.end.wait()
        finally:
            reader.cancel()

    async def _read(self, requests) -> None:
        async for message in requests:
            self.heard.append(message)


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key, self.chain = certificate()
        (folder / "roots.pem").write_bytes(self.chain)
        (folder / "credential").write_text("token\n")
        self.applied: list[int] = []
        self.version = ""
        self.errors: dict[int, tuple[ResourceError, ...]] = {}
        self.task: asyncio.Task[None] | None = None

    def client(self, port: int) -> Stream:
        settings = Settings(
            f"127.0.0.1:{port}", self.folder / "roots.pem", self.folder / "credential", admin="127.0.0.1:1"
        )
        made = Stream(settings, version=lambda: self.version, apply=self.apply)
        self.task = asyncio.create_task(made.run())
        return made

    async def apply(self, update: Update) -> tuple[ResourceError, ...]:
        await asyncio.sleep(0.01)
        self.applied.append(update.nonce)
        self.version = update.version
        return self.errors.get(update.nonce, ())


@pytest.fixture
async def world(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_FIRST_DELAY", 0.05)
    made = World(tmp_path)
    yield made
    if made.task is not None:
        made.task.cancel()
        await asyncio.wait([made.task])


@pytest.fixture
async def controller(world):
    made = Controller(world.key, world.chain)
    yield made
    await made.stop()


async def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within ten seconds")


async def test_updates_are_applied_in_order_and_each_answered(world, controller):
    controller.updates = [Update(1, "v1", complete=True), Update(2, "v2"), Update(3, "v3")]
    error = ResourceError("workload/u", "field: reason")
    world.errors[2] = (error,)
    client = world.client(await controller.start())
    await until(lambda: len(controller.heard) == 4)
    assert world.applied == [1, 2, 3]
    assert controller.heard == [
        Hello("agent", admin="127.0.0.1:1"),
        Ack(1, "v1"),
        Nack(2, "v2", (error,)),
        Ack(3, "v3"),
    ]
    assert client.connected
    assert client.problem == ""


async def test_it_says_what_it_still_holds_after_the_controller_was_away(world, controller):
    controller.updates = [Update(1, "v1", complete=True)]
    port = await controller.start()
    client = world.client(port)
    await until(lambda: len(controller.heard) == 2)
    await controller.stop()
    await until(lambda: not client.connected)
    assert client.problem
    again = Controller(world.key, world.chain)
    again.updates = [Update(7, "v1")]
    try:
        await again.start(port)
        await until(lambda: len(again.heard) == 2)
        assert again.heard == [Hello("agent", version="v1", admin="127.0.0.1:1"), Ack(7, "v1")]
    finally:
        await again.stop()


async def test_a_credential_that_nobody_knows(world, controller):
    (world.folder / "credential").write_text("wrong")
    port = await controller.start()
    client = world.client(port)
    await until(lambda: "UNAUTHENTICATED" in client.problem)
    assert controller.connections == 0
    # Renewed while the process runs.
    controller.updates = [Update(1, "v1", complete=True)]
    (world.folder / "credential").write_text("token")
    await until(lambda: client.connected)


async def test_a_controller_that_is_not_ours(world, controller):
    _, other = certificate()
    (world.folder / "roots.pem").write_bytes(other)
    client = world.client(await controller.start())
    await until(lambda: "UNAVAILABLE" in client.problem)
    assert controller.heard == []


async def test_a_certificate_for_another_address(world):
    world.key, world.chain = certificate("127.0.0.2")
    (world.folder / "roots.pem").write_bytes(world.chain)
    controller = Controller(world.key, world.chain)
    try:
        client = world.client(await controller.start())
        await until(lambda: "UNAVAILABLE" in client.problem)
        assert controller.heard == []
    finally:
        await controller.stop()


@pytest.mark.parametrize("missing", ["roots.pem", "credential"])
async def test_files_that_come_later(world, controller, missing):
    controller.updates = [Update(1, "v1", complete=True)]
    content = (world.folder / missing).read_bytes()
    (world.folder / missing).unlink()
    client = world.client(await controller.start())
    await until(lambda: missing in client.problem)
    await asyncio.sleep(1.5)  # by now it would wait for seconds
    began = time.monotonic()
    (world.folder / missing).write_bytes(content)
    await until(lambda: client.connected)
    assert time.monotonic() - began < 1.0


async def test_back_off_grows_and_is_not_the_same_for_all(world, monkeypatch):
    waits: list[float] = []

    async def pause(self, seconds: float) -> None:
        waits.append(seconds)
        await asyncio.sleep(0)

    (world.folder / "credential").unlink()
    monkeypatch.setattr(stream.Stream, "_pause", pause)
    monkeypatch.setattr(stream, "_LAST_DELAY", 2.0)
    world.client(1)
    await until(lambda: len(waits) >= 30)
    assert waits[0] < 0.2
    assert min(waits[10:30]) >= 1.0
    assert max(waits) <= 2.0
    assert len(set(waits[10:30])) > 10
