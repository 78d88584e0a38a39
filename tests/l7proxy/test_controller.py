"""The real controller, as a process, with each seed configuration alone: what it serves is converted and does what it says."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from l7proxy.model import Config
from l7proxy.resources import Resources
from l7proxy.xds import XdsClient
from tests.l7proxy.conftest import Mesh, eventually
from tests.l7proxy.fakes.backend import Backend, Request, respond
from tests.requirements import ROOT

TOKEN = "token-of-node-a"
VIP = "10.96.7.7"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _pod(app: str, version: str, address: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{app}-{version}",
            "namespace": "default",
            "uid": f"uid-{app}-{version}",
            "labels": {"app": app, "version": version},
        },
        "spec": {"nodeName": "node-a", "serviceAccountName": app, "containers": [{"name": "main"}]},
        "status": {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


class Controlled:
    """A mesh whose configuration comes from a controller over a folder."""

    def __init__(self, mesh: Mesh, folder: Path, target: str) -> None:
        self.mesh = mesh
        self.folder = folder
        self.config = folder / "config"
        self.target = target
        self.resources = Resources(folder / "l7proxy")
        self.backends: dict[str, Backend] = {}
        self.xds: XdsClient | None = None

    def write(self, name: str, *documents: Any) -> None:
        texts = [d if isinstance(d, str) else yaml.safe_dump(d) for d in documents]
        temporary = self.config / f".{name}"
        temporary.write_text("\n---\n".join(texts))
        temporary.replace(self.config / name)

    async def application(self, app: str) -> None:
        """A service with a pod of v1 and one of v2, each with a real server behind its address."""
        port = _free_port()
        for number, version in enumerate(("v1", "v2")):
            address = f"127.0.77.{number + 1}"
            backend = Backend(version, port=port)
            backend._server = await asyncio.start_server(backend._serve, address, port, limit=1 << 20)
            self.backends[version] = backend
            self.mesh.backends.append(backend)
            self.write(f"{app}-{version}.yaml", _pod(app, version, address))
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": app, "namespace": "default"},
            "spec": {
                "clusterIP": VIP,
                "clusterIPs": [VIP],
                "selector": {"app": app},
                "ports": [{"name": "http", "port": 80, "targetPort": port}],
            },
        }
        self.write(f"{app}.yaml", service)
        self.mesh.dialled = (VIP, 80)

    async def subscribe(self, publish: Callable[[Config], None] | None = None) -> None:
        self.xds = XdsClient(
            target=self.target,
            roots=self.folder / "state/roots.pem",
            credential=self.folder / "token",
            node="node-a",
            resources=self.resources,
            publish=publish or self.mesh.proxy.publish,
        )
        self.mesh.proxy.tasks.start(self.xds.run(), name="xds client")

    async def routed(self) -> None:
        """Wait until the service's routes are here, complete."""

        def there() -> bool:
            destination = self.mesh.proxy.config.destination(VIP, 80)
            return destination is not None and destination.routes is not None and not self.resources.warming

        await eventually(there)


@pytest.fixture
async def controlled(mesh: Mesh, tmp_path: Path) -> AsyncIterator[Controlled]:
    for name in ("config", "credentials"):
        (tmp_path / name).mkdir()
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "credentials/node-a").write_text(hashlib.sha256(TOKEN.encode()).hexdigest())
    port, admin = _free_port(), _free_port()
    log = os.open(tmp_path / "controller.log", os.O_WRONLY | os.O_CREAT)
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "controlplane",
            *("--config", str(tmp_path / "config"), "--state", str(tmp_path / "state")),
            *("--listen", f"127.0.0.1:{port}", "--admin", f"127.0.0.1:{admin}"),
            *("--credentials", str(tmp_path / "credentials"), "--server-name", "127.0.0.1"),
            cwd=ROOT, stdout=log, stderr=log,
        )  # fmt: skip
    finally:
        os.close(log)
    result = Controlled(mesh, tmp_path, f"127.0.0.1:{port}")
    mesh_namespace = {"metadata": {"name": "default", "labels": {"mycel.io/mesh": "enabled"}}}
    result.write("namespace.yaml", {"apiVersion": "v1", "kind": "Namespace", **mesh_namespace})
    try:
        await eventually(lambda: (tmp_path / "state/roots.pem").exists())
        yield result
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        if os.environ.get("MYCEL_DEBUG"):
            print((tmp_path / "controller.log").read_text())


async def _seed(controlled: Controlled, shared: Path, app: str, *numbers: str) -> None:
    await controlled.application(app)
    for number in numbers:
        (found,) = (shared / "seed-config").glob(f"{number}-*.yaml")
        controlled.write(found.name, found.read_text())
    await controlled.subscribe()
    await controlled.routed()


def _within(count: int, total: int, share: float) -> bool:
    """Five standard deviations: wrong once in two million runs."""
    deviation: float = (total * share * (1 - share)) ** 0.5
    return abs(count - total * share) <= 5 * deviation


async def _tally(controlled: Controlled, total: int, **headers: str) -> Counter[bytes]:
    client = await controlled.mesh.client()
    return Counter([(await client.get(**headers))[2].strip() for _ in range(total)])


async def test_seed_01_splits_80_to_20(controlled: Controlled, shared: Path) -> None:
    await _seed(controlled, shared, "web-app", "01")
    counts = await _tally(controlled, 1000)
    assert counts[b"v1"] + counts[b"v2"] == 1000
    assert _within(counts[b"v1"], 1000, 0.8), counts


async def test_seed_03_with_04_routes_by_header(controlled: Controlled, shared: Path) -> None:
    await _seed(controlled, shared, "reviews", "03", "04")
    assert await _tally(controlled, 20) == {b"v1": 20}
    assert await _tally(controlled, 20, end_user="jason") == {b"v2": 20}
    assert await _tally(controlled, 20, end_user="jasons") == {b"v1": 20}


async def test_seed_10_alone_answers_503_and_with_subsets_splits(
    controlled: Controlled, shared: Path
) -> None:
    await _seed(controlled, shared, "my-app", "10")
    client = await controlled.mesh.client()
    assert (await client.get())[0] == 503
    assert " 503 NC " in (await controlled.mesh.lines(1))[0]
    subsets = [{"name": v, "labels": {"version": v}} for v in ("v1", "v2")]
    rule = {
        "metadata": {"name": "my-app", "namespace": "default"},
        "spec": {"host": "my-app", "subsets": subsets},
    }
    controlled.write("rule.yaml", {"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", **rule})
    await eventually(lambda: sum("my-app" in name for name in controlled.mesh.proxy.config.clusters) >= 2)
    counts = await _tally(controlled, 1000)
    assert _within(counts[b"v1"], 1000, 0.9), counts
    assert counts[b"v1"] + counts[b"v2"] == 1000


async def test_seed_11_retries_and_times_out(controlled: Controlled, shared: Path) -> None:
    await _seed(controlled, shared, "my-app", "11")
    attempts = 0

    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        nonlocal attempts
        attempts += 1
        if request.line.startswith("GET /slow"):
            await asyncio.sleep(30)
        writer.write(respond(503 if attempts % 4 else 200, b"at last"))

    for backend in controlled.backends.values():
        backend.script = script
    client = await controlled.mesh.client()
    status, _, body = await client.get()
    assert (status, body, attempts) == (200, b"at last", 4)
    # perTryTimeout 2 s, timeout 5 s: the third attempt is cut.
    started = asyncio.get_running_loop().time()
    assert (await client.get("/slow"))[0] == 504
    assert 4.9 < asyncio.get_running_loop().time() - started < 9
    assert " 504 UT " in (await controlled.mesh.lines(2))[1]


async def test_seed_12_has_istios_default_conditions(controlled: Controlled, shared: Path) -> None:
    await _seed(controlled, shared, "my-app", "12")
    for backend in controlled.backends.values():
        await backend.stop()
    client = await controlled.mesh.client()
    assert (await client.get())[0] == 503
    line = (await controlled.mesh.lines(1))[0]
    assert " 503 UF,URX " in line
    assert controlled.mesh.proxy.retries == 3


async def test_the_controller_away_and_back(controlled: Controlled, shared: Path) -> None:
    """What was served is kept, on disk too."""
    await _seed(controlled, shared, "web-app", "01")
    kept = Resources(controlled.folder / "l7proxy")
    await eventually(lambda: len(list((controlled.folder / "l7proxy").glob("*.pb"))) == 4)
    await asyncio.sleep(0.2)
    assert kept.load()
    config = kept.build()
    assert config.destination(VIP, 80) is not None
    assert set(config.clusters) == set(controlled.mesh.proxy.config.clusters)
    assert config.version == controlled.mesh.proxy.config.version


async def test_it_is_synced_when_all_is_here(controlled: Controlled, shared: Path) -> None:
    """Listeners and routes come a round trip after clusters: who served in between would answer 503."""
    moments: list[tuple[bool, bool]] = []

    def publish(config: Config) -> None:
        assert controlled.xds is not None
        destination = config.destination(VIP, 80)
        routed = destination is not None and destination.routes is not None
        moments.append((controlled.xds.synced, routed))

    (found,) = (shared / "seed-config").glob("01-*.yaml")
    await controlled.application("web-app")
    controlled.write(found.name, found.read_text())
    await controlled.subscribe(publish)
    await eventually(lambda: (True, True) in moments)
    assert moments[0] == (False, False)
    assert (True, False) not in moments


async def test_a_wrong_credential_leaves_no_configuration(controlled: Controlled) -> None:
    (controlled.folder / "token").write_text("somebody else's")
    await controlled.application("web-app")
    await controlled.subscribe()
    await asyncio.sleep(1.0)
    assert controlled.xds is not None
    assert not controlled.xds.connected
    assert controlled.mesh.proxy.config.version == ""
    client = await controlled.mesh.client()
    assert (await client.get())[0] == 503
