"""Rows ``policy-fleet``, ``controller-memory`` and ``endpoint-bytes``: a real controller over a real API server, at size.

1,000 Services with 10,000 endpoints, all of them routed, and 200 nodes whose agents, node proxies and l7proxies are simulated by
one process (:mod:`bench.fleet_clients`): they say they have in force what they were sent as soon as they have read it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from bench import fleet_world
from bench.fleet_world import NAMESPACE, Size
from bench.stats import percentile
from common.kubernetes import Access, Client
from deploy import crds, manifests
from deploy.values import load
from lab.kubernetes import ControlPlane

Json = dict[str, Any]
ROWS = ("policy-fleet", "controller-memory", "endpoint-bytes")

_ROUTES = "envoy.config.route.v3.RouteConfiguration"
_ENDPOINTS = "envoy.config.endpoint.v3.ClusterLoadAssignment"
#: Seconds after which a change that not all have acknowledged is a failure; the first start of all may take longer.
_GIVE_UP = 20.0
_FIRST = 300.0


class FleetError(Exception):
    """A figure could not be measured."""


def measure(*, say: Callable[[str], None], rounds: int = 60, size: Size | None = None) -> Json:
    """All figures.

    :raises FleetError: with what went wrong.
    """
    return asyncio.run(_measure(say, rounds, size or Size()))


async def _measure(say: Callable[[str], None], rounds: int, size: Size) -> Json:
    with tempfile.TemporaryDirectory(prefix="mycel-fleet-") as name, ControlPlane() as control_plane:
        folder = Path(name)
        say(f"fleet: {size.services} services, {size.services * size.replicas} pods, {size.nodes} nodes")
        values = load()
        objects = [
            manifests.namespace_object(values, NAMESPACE),
            *crds.definitions(["istio"]),
            *manifests.own_crds(),
        ]
        control_plane.kubectl("apply", "--server-side", "-f", "-", input=yaml.safe_dump_all(objects))
        objects = manifests.build(values, NAMESPACE)
        kinds = (
            "ServiceAccount",
            "Secret",
            "ConfigMap",
            "ClusterRole",
            "ClusterRoleBinding",
            "Role",
            "RoleBinding",
        )
        kept = [o for o in objects if o["kind"] in (*kinds, "Lease", "Service")]
        control_plane.kubectl("apply", "--server-side", "-f", "-", input=yaml.safe_dump_all(kept))
        async with Client(Access.load(control_plane.kubeconfig)) as client:
            begun = time.monotonic()
            tokens = await fleet_world.create(client, size)
            say(f"fleet: objects created in {time.monotonic() - begun:.0f} s")
            async with AsyncExitStack() as stack:
                controller = await stack.enter_async_context(_controller(control_plane.kubeconfig, folder))
                (folder / "tokens.json").write_text(json.dumps(tokens))
                (folder / "tokens.json").chmod(0o600)
                clients = await stack.enter_async_context(_clients(controller, folder, size))
                return await _rounds(client, controller, clients, size, rounds, say)


async def _rounds(
    client: Client,
    controller: _Controller,
    clients: _Clients,
    size: Size,
    rounds: int,
    say: Callable[[str], None],
) -> Json:
    await asyncio.sleep(3)  # what a first start leaves to do is no part of a change
    await clients.sent()
    results: dict[str, list[float]] = {"policy": [], "routes": [], "endpoint": []}
    most: dict[str, int] = {}
    for number in range(rounds):
        service = number * 37 % size.services
        policy = fleet_world.policy(service, size, 1000 + number)
        elapsed = await _change(client, clients, policy, ("mesh",))
        results["policy"].append(elapsed)
        changed = fleet_world.routes(service, size, 51 + number % 49)
        results["routes"].append(await _change(client, clients, changed, ("mesh", _ROUTES)))
        await _quiet(clients)
        started = time.monotonic()
        await fleet_world.set_ready(client, size, service, number % size.replicas, False)
        results["endpoint"].append(await clients.acknowledged(("mesh", _ENDPOINTS)) - started)
        sent = await _quiet(clients)
        for component, count in sent.items():
            most[component] = max(most.get(component, 0), count)
        say(f"fleet: {number + 1}/{rounds} policy {results['policy'][-1] * 1000:.0f} ms")
    changes = results["policy"] + results["routes"]
    return {
        "fleet_policy_p50_ms": round(median(changes) * 1000, 1),
        "fleet_policy_p99_ms": round(percentile(changes, 99) * 1000, 1),
        "fleet_policy_changes": len(changes),
        "fleet_endpoint_p50_ms": round(median(results["endpoint"]) * 1000, 1),
        "fleet_endpoint_p99_ms": round(percentile(results["endpoint"], 99) * 1000, 1),
        "controller_mb": round(controller.memory("VmRSS"), 1),
        "controller_peak_mb": round(controller.memory("VmHWM"), 1),
        "endpoint_bytes": most,
    }


async def _change(client: Client, clients: _Clients, o: Json, streams: tuple[str, ...]) -> float:
    """Seconds from before an object is applied until the last client of these streams has acknowledged."""
    where = fleet_world.path(o, o["metadata"]["name"])
    started = time.monotonic()
    await client.apply(where, o, "bench", force=True)
    return await clients.acknowledged(streams) - started


async def _quiet(clients: _Clients) -> dict[str, int]:
    """What each kind of client was sent (the most of any), once nothing comes any more."""
    await asyncio.sleep(0.3)
    return await clients.sent()


class _Controller:
    def __init__(self, process: asyncio.subprocess.Process, port: int, state: Path) -> None:
        self._process = process
        self.port = port
        self.roots = state / "roots.pem"

    def memory(self, what: str) -> float:
        """Resident memory in MB (10^6 bytes): now (``VmRSS``), or at the worst moment so far (``VmHWM``)."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise FleetError("the controller's memory is not known")


@asynccontextmanager
async def _controller(kubeconfig: Path, folder: Path) -> AsyncIterator[_Controller]:
    port, admin = _free_port(), _free_port()
    log = folder / "controller.log"
    command = [sys.executable, "-m", "controlplane", "--kubernetes", "--kubeconfig", kubeconfig]
    command += ["--namespace", NAMESPACE, "--replica", "bench", "--state", folder / "state"]
    command += [
        "--listen",
        f"127.0.0.1:{port}",
        "--admin",
        f"127.0.0.1:{admin}",
        "--server-name",
        "127.0.0.1",
    ]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*map(str, command), stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + _FIRST
        while not await asyncio.to_thread(_ready, admin):
            if process.returncode is not None or time.monotonic() > deadline:
                raise FleetError(f"the controller is not ready: {log.read_text()[-2000:]}")
            await asyncio.sleep(0.1)
        yield _Controller(process, port, folder / "state")
    finally:
        await _end(process)


class _Clients:
    """The process of simulated clients."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self._seen: dict[str, float] = {}

    async def acknowledged(self, streams: tuple[str, ...], timeout: float = _GIVE_UP) -> float:
        """The time at which the last client of the last of these streams has acknowledged what is new.

        :raises FleetError: not all have.
        """
        self._seen = {}
        try:
            async with asyncio.timeout(timeout):
                while not all(stream in self._seen for stream in streams):
                    await self._line()
        except TimeoutError:
            missing = ", ".join(s for s in streams if s not in self._seen)
            raise FleetError(f"not all have acknowledged within {timeout} s: {missing}") from None
        return max(self._seen[stream] for stream in streams)

    async def sent(self) -> dict[str, int]:
        """The most bytes that a client was sent since the last time, by component."""
        assert self._process.stdin
        self._process.stdin.write(b"bytes\n")
        while True:
            message = await self._line()
            if "bytes" in message:
                found: dict[str, int] = message["bytes"]
                return found

    async def _line(self) -> Json:
        assert self._process.stdout
        line = await self._process.stdout.readline()
        if not line:
            raise FleetError(f"the clients have ended: {self._log.read_text()[-2000:]}")
        message: Json = json.loads(line)
        if "stream" in message:
            self._seen[message["stream"]] = message["at"]
        return message


@asynccontextmanager
async def _clients(controller: _Controller, folder: Path, size: Size) -> AsyncIterator[_Clients]:
    log = folder / "clients.log"
    command = [sys.executable, "-m", "bench.fleet_clients", f"127.0.0.1:{controller.port}"]
    command += [str(controller.roots), str(folder / "tokens.json")]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output
        )
    try:
        clients = _Clients(process, log)
        await clients.acknowledged(("mesh", _ROUTES, _ENDPOINTS), _FIRST)
        yield clients
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
