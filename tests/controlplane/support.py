"""Manifests as a cluster writes them, and a controller with real clients on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import json
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import yaml

from controlplane import api
from controlplane.compiler import compile_snapshot, validate
from controlplane.controller import Controller, Options, folder_backing
from controlplane.model.snapshot import Snapshot
from controlplane.model.world import Settings
from controlplane.source.manifests import parse
from controlplane.source.objects import Object, key_of

Manifest = dict[str, Any]
TOKENS = {"node-a": "token-of-node-a", "node-b": "token-of-node-b"}


def namespace(name: str = "default", **labels: str) -> Manifest:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def mesh_namespace(name: str = "default") -> Manifest:
    return namespace(name, **{"mycel.io/mesh": "enabled"})


def pod(
    name: str,
    address: str = "",
    node: str = "node-a",
    account: str = "default",
    ns: str = "default",
    ready: bool = True,
    uid: str = "",
    ports: dict[str, int] | None = None,
    **labels: Any,
) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": ns, "uid": uid or f"uid-{ns}-{name}", "labels": labels},
        "spec": {
            "nodeName": node,
            "serviceAccountName": account,
            "containers": [
                {
                    "name": "main",
                    "ports": [{"name": n, "containerPort": p} for n, p in (ports or {}).items()],
                }
            ],
        },
        "status": {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}] if address else [],
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


def service(
    name: str,
    address: str | None = "10.96.0.10",
    ports: list[Manifest] | None = None,
    ns: str = "default",
    selector: dict[str, str] | None = None,
) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": ns},
        "spec": {
            "clusterIP": address or "None",
            "clusterIPs": [address or "None"],
            "selector": selector if selector is not None else {"app": name},
            "ports": ports or [{"name": "http", "port": 80, "targetPort": 8080}],
        },
    }


def istio(kind: str, name: str, spec: Manifest, ns: str = "default", **metadata: Any) -> Manifest:
    group = "networking" if kind in ("VirtualService", "DestinationRule") else "security"
    return {
        "apiVersion": f"{group}.istio.io/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": ns, **metadata},
        "spec": spec,
    }


def two_versions(name: str = "web-app", address: str = "10.96.0.10") -> list[Manifest]:
    """A service with a pod of v1 on one node and one of v2 on the other, in an enrolled namespace."""
    return [
        mesh_namespace(),
        service(name, address),
        pod(f"{name}-v1", "10.1.0.1", "node-a", f"{name}", app=name, version="v1"),
        pod(f"{name}-v2", "10.2.0.2", "node-b", f"{name}", app=name, version="v2"),
    ]


def subsets(name: str, *versions: str, **policy: Any) -> Manifest:
    return istio(
        "DestinationRule",
        name,
        {"host": name, "subsets": [{"name": v, "labels": {"version": v}} for v in versions], **policy},
    )


def objects(*manifests: Manifest | str) -> dict[Any, Object]:
    """Objects by key from manifests or YAML; a manifest that is refused is an error of the test."""
    result = {}
    for item in manifests:
        text = item if isinstance(item, str) else json.dumps(item)
        for document in parse(text.encode()):
            assert document.manifest is not None, document.error
            problems = list(validate(document.manifest))
            assert not problems, problems
            key = key_of(document.manifest)
            assert key not in result, f"{key} stands twice"
            result[key] = Object(key, document.manifest)
    return result


def compile_all(*manifests: Manifest | str, settings: Settings | None = None) -> Snapshot:
    return compile_snapshot(objects(*manifests), settings or Settings())


def messages(snapshot: Snapshot, about: str = "") -> str:
    """All findings as text, or those of one object."""
    return "\n".join(str(f) for f in snapshot.findings if about in f.object)


def write(folder: Path, name: str, *manifests: Manifest | str) -> Path:
    """Write a file as careful writers do: complete, then renamed."""
    path = folder / name
    temporary = folder / f".{name}.new"
    texts = [m if isinstance(m, str) else yaml.safe_dump(m) for m in manifests]
    temporary.write_text("\n---\n".join(texts))
    temporary.replace(path)
    return path


class Harness:
    """A controller that serves on loopback, with its folders."""

    def __init__(self, root: Path) -> None:
        self.config = root / "config"
        self.state = root / "state"
        self.credentials = root / "credentials"
        for folder in (self.config, self.credentials):
            folder.mkdir(parents=True, exist_ok=True)
        for node, token in TOKENS.items():
            (self.credentials / node).write_text(hashlib.sha256(token.encode()).hexdigest() + "\n")
        self.controller: Controller

    def options(self, **changes: Any) -> Options:
        values: dict[str, Any] = {
            "state": self.state,
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "server_names": ("127.0.0.1", "controller.test"),
        }
        return Options(**{**values, **changes})

    @asynccontextmanager
    async def serving(self, **changes: Any) -> AsyncIterator[Controller]:
        self.controller = Controller(
            self.options(**changes), folder_backing(self.config, self.credentials, self.state)
        )
        await self.controller.start()
        try:
            yield self.controller
        finally:
            await self.controller.stop()

    def channel(self, roots: bytes | None = None) -> grpc.aio.Channel:
        trusted = roots if roots is not None else (self.state / "roots.pem").read_bytes()
        return grpc.aio.secure_channel(
            f"127.0.0.1:{self.controller.port}",
            grpc.ssl_channel_credentials(trusted),
            options=[("grpc.max_receive_message_length", -1)],
        )

    async def clients(self) -> list[dict[str, Any]]:
        """The clients that the controller shows."""
        page = await self.page("/debug/clients")
        return list(page["clients"])

    async def page(self, path: str) -> Any:
        url = f"http://127.0.0.1:{self.controller.admin_port}{path}"

        def get() -> bytes:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bytes(answer.read())

        body = await asyncio.to_thread(get)
        return json.loads(body) if path.startswith("/debug") else body.decode()


async def eventually(probe: Callable[[], Awaitable[bool]], timeout: float = 10.0) -> None:
    """Wait until something holds; how soon depends on what else the machine does."""
    async with asyncio.timeout(timeout):
        while True:
            if await probe():
                return
            await asyncio.sleep(0.02)


def bearer(node: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {TOKENS[node]}"),)


class MeshClient:
    """One Subscribe stream, driven by hand."""

    def __init__(self, channel: grpc.aio.Channel, node: str = "node-a", metadata: Any = None) -> None:
        call: Any = channel.stream_stream(api.METHOD_SUBSCRIBE)
        self.stream = call(metadata=metadata if metadata is not None else bearer(node))
        self.state: dict[str, api.Resource] = {}
        self.version = ""

    async def hello(self, component: str = "agent", version: str = "", **fields: Any) -> None:
        await self.stream.write(api.encode(api.Hello(component, version=version, **fields)))

    async def receive(self, timeout: float = 5.0) -> api.Update:
        # Not wait_for, which loses a cancellation that comes together with the data in Python 3.11.
        async with asyncio.timeout(timeout):
            data = await self.stream.read()
        assert isinstance(data, bytes), "the stream has ended"
        return api.decode_update(data)

    async def ack(self, update: api.Update) -> None:
        await self.stream.write(api.encode(api.Ack(update.nonce, update.version)))

    async def nack(self, update: api.Update, **errors: str) -> None:
        reasons = tuple(api.ResourceError(k, r) for k, r in errors.items())
        await self.stream.write(api.encode(api.Nack(update.nonce, update.version, reasons)))

    async def take(self, timeout: float = 5.0) -> api.Update:
        """Receive one update, apply it as a client has to, and acknowledge it."""
        update = await self.receive(timeout)
        if update.complete:
            self.state = {}
        for key in update.removes:
            del self.state[key]
        self.state |= {api.resource_key(r): r for r in update.upserts}
        self.version = update.version
        await self.ack(update)
        return update
