"""The controller as one object: source to compiler to publisher, with the services on top. ``__main__`` gives it a process."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from common import logs, spiffe
from common.admin import AdminServer
from common.tasks import Tasks
from controlplane.api import Workload
from controlplane.ca.authority import Authority, open_authority, utc_now
from controlplane.ca.service import CertificateService
from controlplane.clients import Clients
from controlplane.compiler import Compiler, validate
from controlplane.credentials import Credentials, FolderCredentials, Gate
from controlplane.model.findings import Finding, from_fault
from controlplane.model.snapshot import Snapshot
from controlplane.model.world import OUTSIDE, Settings
from controlplane.publisher import Publisher
from controlplane.quarantine import settle
from controlplane.room import Room
from controlplane.server import ServerCertificate, make_server
from controlplane.source import Key, Object, Source, State
from controlplane.source.folder import Folder
from controlplane.source.lastgood import LastGood
from controlplane.standin import in_force
from controlplane.status.keeper import Keeper, page
from controlplane.status.programming import Programming
from controlplane.status.replicas import ReplicaService
from controlplane.stream.service import MeshService
from controlplane.xds.service import DiscoveryService

_log = logs.get(__name__)
#: Seconds that streams get to end when the controller stops.
_GRACE = 1.0
#: Seconds until a source that failed is followed again.
_SOURCE_AGAIN = 1.0
#: Seconds between looks at whether those who are connected may stay.
_CREDENTIALS_AGAIN = 5.0


@dataclass(frozen=True)
class Options:
    """What the command line says. Addresses are ``ADDRESS:PORT``; port 0 takes any."""

    state: Path
    listen: str
    admin: str
    server_names: Sequence[str]
    trust_domain: str = "cluster.local"
    outside: frozenset[str] = OUTSIDE  #: namespaces of which no pod is ever in the mesh


@dataclass(frozen=True)
class Backing:
    """What a controller stands on: where objects come from, who signs, and who is let in."""

    source: Source
    authority: Authority
    credentials: Credentials
    #: False while the source has nothing to serve yet: what is served before would be taken for all that there is.
    ready: Callable[[], bool] = lambda: True
    #: (node, component) of our processes that should be connected to some controller
    expected: Callable[[], Iterable[tuple[str, str]]] = tuple


def folder_backing(config: Path, credentials: Path, state: Path) -> Backing:
    """Manifests, credentials and the root in folders.

    :raises AuthorityError: the root is broken.
    :raises OSError: ``state`` cannot be made.
    """
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    source = Folder(config, validate, LastGood(state / "last-good.json"))
    return Backing(source, open_authority(state / "ca", utc_now()), FolderCredentials(credentials))


class Controller:
    """Call :meth:`start`, then wait for what you like, then :meth:`stop`."""

    def __init__(self, options: Options, backing: Backing, registry: CollectorRegistry | None = None) -> None:
        spiffe.check_trust_domain(options.trust_domain)
        self._options = options
        self._registry = registry or CollectorRegistry()
        self._tasks = Tasks()
        options.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = backing.authority
        _write_public(options.state / "roots.pem", authority.roots_pem)
        self._compiler = Compiler(
            Settings(options.trust_domain, authority.roots_pem, outside=options.outside)
        )
        self._metrics()
        self._source = backing.source
        self._faults: tuple[Finding, ...] = ()
        self.refused: Mapping[Key, Object] = {}  #: as written; an older version is in force, or none
        self._compiled: Mapping[Key, Object] = {}
        self._publisher = Publisher(self._compiler.compile(self._compiled))
        self.clients = Clients(self._registry)
        self._certificate = ServerCertificate(authority, options.server_names)
        self._gate = gate = Gate(backing.credentials, self._registry)
        room = Room()
        self._mesh = MeshService(self._publisher, gate, self.clients, room)
        self._certificates = CertificateService(
            authority, self._publisher, gate, self._registry, self._never_enrolled
        )
        self._discovery = DiscoveryService(self._publisher, gate, self.clients, room)
        self._backing = backing
        self._programming = Programming()
        self.status = Keeper(self, self.clients, self._programming, backing.expected)
        self._replicas = ReplicaService(gate, self.clients, self._programming)
        self._serving = False
        self._has_objects = asyncio.Event()
        self._accept(self._compile(self._source.load()))

    @property
    def snapshot(self) -> Snapshot:
        return self._publisher.snapshot

    @property
    def objects(self) -> Mapping[Key, Object]:
        """What is in force."""
        return self._compiled

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong in files, then what the compiler says."""
        return self._faults + self.snapshot.findings

    def ready(self) -> bool | str:
        """True, or why not."""
        return self._serving or "the configuration was not read yet"

    async def start(self) -> None:
        """Serve, as soon as there is something to serve. Ports are bound when this returns.

        :raises OSError: an address cannot be bound.
        """
        self._server, self.port = make_server(
            self._options.listen, self._certificate, self._mesh, self._certificates, self._discovery
        )
        self._server.add_generic_rpc_handlers((self._replicas.handler(),))
        host, _, port = self._options.admin.rpartition(":")
        self._admin = AdminServer(
            host.strip("[]"), int(port), registry=self._registry, ready=self.ready, json=self._pages()
        )
        self.admin_port = self._admin.port
        self._admin.start()
        self._tasks.start(self._follow(), name="source")
        if self._has_objects.is_set():
            await self._serve()
        else:
            self._tasks.start(self._serve_when_ready(), name="serve")
        self._tasks.start(self.status.run(), name="status")
        self._tasks.start(self._end_streams(), name="credentials")

    async def _serve(self) -> None:
        # What there is by now mostly stays: a million objects, which to look through for cycles again and again would stop
        # everything for half a second each time.
        gc.collect()
        gc.freeze()
        await self._server.start()
        self._serving = True
        _log.info("serving", port=self.port, admin=self.admin_port, version=self.snapshot.version[:12])

    async def _serve_when_ready(self) -> None:
        _log.info("waiting for the configuration", admin=self.admin_port)
        await self._has_objects.wait()
        await self._serve()

    async def stop(self) -> None:
        """End all streams and the admin server."""
        await self._tasks.cancel()
        await self._server.stop(_GRACE)
        self._admin.close()

    async def _follow(self) -> None:
        while True:
            try:
                async for state in self._source.changes():
                    self._take(state)
            except Exception as e:
                # No inotify instance to be had, or a bug of ours: what is served stays as it was meanwhile.
                _log.exception("the source failed; it is followed again", e)
            await asyncio.sleep(_SOURCE_AGAIN)

    async def _end_streams(self) -> None:
        """End the streams of callers that were let in once and would not be now."""
        while True:
            await asyncio.sleep(_CREDENTIALS_AGAIN)
            self.clients.end(self._gate.ended)

    def _take(self, state: State) -> None:
        started = time.monotonic()
        snapshot = self._compile(state)
        before = self.snapshot
        self._accept(snapshot)
        self._duration.observe(time.monotonic() - started)
        if snapshot.version != before.version:
            _log.info("snapshot", version=snapshot.version[:12], objects=len(state.objects))

    def _accept(self, snapshot: Snapshot) -> None:
        self._publisher.publish(snapshot)
        self._programming.published(snapshot.version, self._compiled)
        self.status.published()
        if self._backing.ready():
            self._has_objects.set()

    def _attempt(self, objects: Mapping[Key, Object]) -> Snapshot:
        """Compile, down to the last byte that is served."""
        snapshot = self._compiler.compile(objects)
        self._discovery.prepare(snapshot)
        return snapshot

    def _compile(self, state: State) -> Snapshot:
        objects, strict = in_force(state)
        faults = tuple(from_fault(f) for f in (*state.faults, *strict))
        try:
            snapshot = self._attempt(objects)
        except Exception as e:
            # A bug of ours, not the user's fault: it costs as few objects as possible.
            self._rejected.inc()
            _log.exception("state cannot be compiled; looking for the object", e)
            objects, quarantined = settle(self._compiled, objects, self._attempt)
            faults += tuple(from_fault(f) for f in quarantined)
            # Of those without a good version the strictest is in force, as of one that its schema refuses.
            lost = {f.key: state.objects[f.key] for f in quarantined if f.key and f.key in state.objects}
            objects, strict = in_force(State(objects, refused=lost))
            faults += tuple(from_fault(f) for f in strict)
            snapshot = self._attempt(objects)
        self._compiled = objects
        self.refused = state.refused
        for fault in faults:
            if fault not in self._faults:
                _log.error("configuration refused", finding=str(fault))
        self._faults = faults
        self._objects.set(len(objects))
        for severity, count in _count(self._faults + snapshot.findings).items():
            self._findings.labels(severity).set(count)
        self._changes.inc()
        return snapshot

    def _never_enrolled(self, workload: Workload) -> bool:
        """True for pods of a namespace outside of the mesh, and those with the node's network: neither ever changes."""
        pod = self._compiled.get(Key("", "Pod", workload.namespace, workload.name))
        return pod is None or workload.namespace in self._options.outside or bool(pod.spec.get("hostNetwork"))

    def _metrics(self) -> None:
        registry = self._registry
        self._objects = Gauge("mycel_controlplane_objects", "Objects in force.", registry=registry)
        self._findings = Gauge(
            "mycel_controlplane_findings", "Findings by severity.", ["severity"], registry=registry
        )
        self._changes = Counter("mycel_controlplane_compilations", "Snapshots compiled.", registry=registry)
        self._rejected = Counter(
            "mycel_controlplane_snapshots_rejected",
            "States that could not be compiled whole.",
            registry=registry,
        )
        self._duration = Histogram(
            "mycel_controlplane_compile_seconds",
            "From a change read to its snapshot published.",
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
            registry=registry,
        )

    def _pages(self) -> dict[str, Any]:
        return {
            "/debug/snapshot": self._snapshot_page,
            "/debug/findings": lambda: [_finding(f) for f in self.findings],
            "/debug/clients": lambda: {"version": self.snapshot.version, "clients": list(self.clients)},
            "/debug/status": lambda: page(self.status.verdicts),
            "/debug/workloads": lambda: list(self.snapshot.workloads.values()),
        }

    def _snapshot_page(self) -> object:
        snapshot = self.snapshot
        return {
            "version": snapshot.version,
            "resources": list(snapshot.resources.values()),
            "clusters": list(snapshot.clusters.values()),
            "tables": list(snapshot.tables.values()),
        }


def _finding(finding: Finding) -> dict[str, str]:
    return {
        "severity": finding.severity.name.lower(),
        "file": finding.file,
        "object": finding.object,
        "field": finding.field,
        "message": finding.message,
        "action": finding.action,
    }


def _count(findings: Sequence[Finding]) -> dict[str, int]:
    result = {"error": 0, "warning": 0, "info": 0}
    for finding in findings:
        result[finding.severity.name.lower()] += 1
    return result


def _write_public(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, "ascii")
    temporary.chmod(0o644)
    temporary.replace(path)


async def run(options: Options, backing: Backing, stop: asyncio.Event) -> None:
    """Serve until ``stop`` is set."""
    controller = Controller(options, backing)
    await controller.start()
    try:
        await stop.wait()
    finally:
        await controller.stop()
