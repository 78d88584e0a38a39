"""An API server of these tests' own (they stop it, and change which kinds it has), and what they need around it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from common.kubernetes import Access, ApiError, Client, path_of
from controlplane.compiler import validate
from controlplane.source import Key, State
from controlplane.source.kubernetes import KubernetesSource
from controlplane.source.lastgood import LastGood
from deploy import crds
from lab.kubernetes import ControlPlane
from tests.requirements import require_root

#: Seconds within which a change has to be seen; generous, for a busy machine.
SOON = 20.0


@pytest.fixture(scope="package")
def server() -> Iterator[ControlPlane]:
    require_root()
    with ControlPlane() as control_plane:
        yield control_plane


@pytest.fixture(scope="package")
def mesh_server(server: ControlPlane) -> ControlPlane:
    """With all definitions that we bring but Gateway API's, which are large."""

    async def install() -> None:
        async with Client(Access.load(server.kubeconfig)) as client:
            await install_definitions(client, "istio", "linkerd", "smi")

    asyncio.run(install())
    return server


@pytest.fixture
async def client(server: ControlPlane) -> AsyncIterator[Client]:
    async with Client(Access.load(server.kubeconfig)) as made:
        yield made


async def install_definitions(client: Client, *projects: str) -> list[str]:
    """Bring those that are missing, and wait until they are served; their names."""
    names = []
    for crd in await crds.missing(client, projects):
        name = crd["metadata"]["name"]
        names.append(name)
        path = path_of("apiextensions.k8s.io/v1", "customresourcedefinitions", name=name)
        await client.apply(path, crd, "test")
    for name in names:
        await established(client, name)
    return names


async def established(client: Client, name: str) -> None:
    path = path_of("apiextensions.k8s.io/v1", "customresourcedefinitions", name=name)
    async with asyncio.timeout(SOON):
        while True:
            crd = await client.get(path)
            conditions = {c["type"]: c["status"] for c in (crd.get("status") or {}).get("conditions") or ()}
            if conditions.get("Established") == "True":
                version = next(v["name"] for v in crd["spec"]["versions"] if v["storage"])
                with contextlib.suppress(ApiError):
                    await client.get(
                        path_of(f"{crd['spec']['group']}/{version}", crd["spec"]["names"]["plural"])
                    )
                    return
            await asyncio.sleep(0.05)


class Followed:
    """A source that is followed; keeps every state that it handed out."""

    def __init__(self, source: KubernetesSource) -> None:
        self.source = source
        self.states: list[State] = []
        self._came = asyncio.Event()

    @property
    def state(self) -> State:
        return self.states[-1]

    @property
    def objects(self) -> dict[Key, Any]:
        return dict(self.state.objects)

    def take(self, state: State) -> None:
        self.states.append(state)
        self._came.set()

    async def until(self, holds: Callable[[State], Any], timeout: float = SOON) -> State:
        """Wait for a state of which this holds (one that is there already counts)."""
        async with asyncio.timeout(timeout):
            while not (self.states and holds(self.state)):
                self._came.clear()
                await self._came.wait()
        return self.state


@contextlib.asynccontextmanager
async def following(
    client: Client, last_good: LastGood | None = None, patience: float = 30.0
) -> AsyncIterator[Followed]:
    """A source that is followed, as the controller does."""
    followed = Followed(KubernetesSource(client, validate, last_good, patience=patience))
    followed.take(followed.source.load())

    async def follow() -> None:
        async with contextlib.aclosing(followed.source.changes()) as states:
            async for state in states:
                followed.take(state)

    task = asyncio.create_task(follow())
    try:
        yield followed
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Relay:
    """A TCP relay before the API server that can be cut: connections end and none is taken, as when it is away."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._open: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.connections = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in tuple(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        self.connections += 1
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(*self._target)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(_pump(reader, upstream_writer))
                    group.create_task(_pump(upstream_reader, writer))
            finally:
                upstream_writer.close()
        except (OSError, asyncio.CancelledError, ExceptionGroup):
            pass
        finally:
            writer.transport.abort()
            self._open.discard(task)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.write_eof() if writer.can_write_eof() else None


@pytest.fixture
async def relay(server: ControlPlane) -> AsyncIterator[Relay]:
    made = Relay(server.address, server.port)
    await made.start()
    yield made
    if made._server is not None:
        await made.cut()


@pytest.fixture
async def relayed(server: ControlPlane, relay: Relay) -> AsyncIterator[Client]:
    """A client whose way to the server leads through ``relay``."""
    access = Access.load(server.kubeconfig)
    access.server = f"https://127.0.0.1:{relay.port}"
    async with Client(access) as made:
        yield made


@contextlib.asynccontextmanager
async def scripted(*answers: Callable[[web.Request], Any]) -> AsyncIterator[tuple[Access, list[str]]]:
    """A server that gives these answers in turn, the last one for ever; and the requests that it got."""
    asked: list[str] = []

    async def answer(request: Any) -> web.StreamResponse:
        asked.append(request.method)
        found = answers[min(len(asked), len(answers)) - 1](request)
        if asyncio.iscoroutine(found):
            found = await found
        assert isinstance(found, web.StreamResponse)
        return found

    server = web.Server(answer)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield Access(f"http://127.0.0.1:{runner.addresses[0][1]}"), asked
    finally:
        await runner.cleanup()


def busy(status: int, **headers: str) -> Callable[[web.Request], web.Response]:
    return lambda _: web.json_response({"kind": "Status", "reason": "Busy"}, status=status, headers=headers)
