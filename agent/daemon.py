"""Wires the agent together and runs it until it is told to end.

Owns start and end: the loader child first, then the kernel's tables, then what serves others, so that nobody is answered before
the node is as its last good state says. An end is an upgrade: kernel state, pins and proxies are left alone.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from agent import api, leaving, processes
from agent.cni_node import BUNDLE, CniNode, entry
from agent.cni_node import InstallError as CniInstallError
from agent.cni_node import Settings as CniSettings
from agent.cni_service import CniService
from agent.debug import pages, queries
from agent.enrolment import EnrolmentFile
from agent.flow_metrics import Records
from agent.flowlog import KEEP, RATE, FlowLog, Names, Sink
from agent.kernel import Kernel, KernelError
from agent.leave import leave
from agent.live import Live
from agent.metrics import CniLatencies, Collector, View, name_of
from agent.namespaces import Namespaces
from agent.node import Node
from agent.packets import Server
from agent.pressure import Alarm
from agent.prober import Prober
from agent.programmer import Programmer
from agent.proxies import Proxies
from agent.refusals import Refusals
from agent.roles import RoleError, Roles, vouch
from agent.sockets import PodSockets
from agent.splice import SpliceMetrics, Splicer
from agent.storage import Storage
from agent.stream import Settings, Stream
from agent.sweeper import Sweeper
from bpf.wire import Role
from cni import protocol
from common import logs
from common.admin import AdminServer
from common.tasks import Tasks
from controlplane.api import ResourceError, Update

_log = logs.get(__name__)

AGENT_SOCKET = "agent.sock"
#: Folders of the run folder in which the proxies write: their own socket, their last good configuration.
PROXY_FOLDERS = ("nodeproxy", "l7proxy")
#: Seconds for the loader child: compiling takes a second, on a machine under load several.
_LOADER_TIMEOUT = 120.0
LOCK = "agent.lock"
#: Seconds that a predecessor has to end.
_PREDECESSOR_TIMEOUT = 30.0


class StartError(Exception):
    """The agent cannot start; the message says why."""


@dataclass(frozen=True)
class Options:
    """The command line. ``admin`` is (address, port).

    Without ``cni_bin`` and ``cni_conf`` the node's CNI configuration is somebody else's; ``daemonset`` is the one that runs this
    agent, ``outside`` are namespaces whose pods are never in the mesh. ``flow_log`` is a file or ``-``, with that many
    lines per second at most; ``flow_records`` are kept in memory. ``revoke_after``: see :class:`agent.sweeper.Sweeper`.
    """

    node: str
    run: Path
    state: Path
    pins: Path
    cgroup: Path
    controller: str
    roots: Path
    credential: Path
    admin: tuple[str, int]
    proxy_group: int = 15008
    prober: str = "none"
    prober_cgroup: Path | None = None
    envoy_cgroup: Path | None = None
    cni_bin: Path | None = None
    cni_bin_host: str = ""
    cni_conf: Path | None = None
    cni_bundle: Path = BUNDLE
    daemonset: str = ""
    outside: tuple[str, ...] = ()
    #: Of kernel maps, where they are not the usual ones.
    map_sizes: Mapping[str, int] = field(default_factory=dict)
    splice: bool = True
    revoke_after: float | None = 0.0
    flow_log: str = ""
    flow_log_rate: int = RATE
    flow_records: int = KEEP


async def run(options: Options) -> None:
    """Run until SIGTERM or SIGINT.

    :raises StartError: it cannot start.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with await _alone(options.run):
        _make_folders(options.run, options.proxy_group)
        await _load(options)
        try:
            kernel = Kernel(options.pins)
        except KernelError as error:
            raise StartError(str(error)) from None
        with kernel:
            leaves = await _serve(options, kernel, stop)
        if leaves:
            await asyncio.to_thread(leave, options.pins, (options.run, options.state))


async def leave_node(run: Path, state: Path, pins: Path) -> None:
    """Take the mesh off this node.

    :raises StartError: an agent runs.
    """
    with await _alone(run, patience=2.0):
        await asyncio.to_thread(leave, pins, (run, state))


async def _alone(folder: Path, *, patience: float = _PREDECESSOR_TIMEOUT) -> BinaryIO:
    """Wait until no other agent runs on this node, and keep others out while the file is open.

    :raises StartError: it does not end.
    """
    file = _lock_file(folder)
    attempts = int(patience / 0.1)
    for attempt in range(attempts):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt == 0:
                _log.warning("another agent still runs on this node: waiting for its end", run=str(folder))
            await asyncio.sleep(0.1)
        else:
            return file
    file.close()
    raise StartError(f"another agent runs with {folder}, and did not end in {patience:g} s")


def _make_folders(run: Path, group: int) -> None:
    """What the proxies write in, by their group: they run without root, and nobody else has to get in.

    :raises StartError: the group is not ours to give.
    """
    for name in PROXY_FOLDERS:
        folder = run / name
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            os.chown(folder, -1, group)
            folder.chmod(0o2770)
        except PermissionError:
            raise StartError(
                f"{folder}: cannot be given to group {group}; the agent has to be a member of it (supplementalGroups)"
            ) from None
        except OSError as error:
            raise StartError(f"{folder}: {error.strerror}") from None


def _lock_file(folder: Path) -> BinaryIO:
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        return (folder / LOCK).open("ab")
    except OSError as error:
        raise StartError(f"{error.filename}: {error.strerror}") from None


async def _load(options: Options) -> None:
    """Run the loader and wait for it: it compiles, pins, attaches and ends, and takes LLVM with it."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bpf.loader", "--pins", str(options.pins), "--cgroup", str(options.cgroup)),
        *(f"--size={name}={size}" for name, size in options.map_sizes.items()),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_LOADER_TIMEOUT):
            done, errors = await child.communicate()
    except BaseException as error:
        if child.returncode is None:
            child.kill()
            await child.wait()
        if isinstance(error, TimeoutError):
            raise StartError(f"the loader was not done in {_LOADER_TIMEOUT:g} s") from None
        raise
    if child.returncode:
        raise StartError(f"the loader failed: {errors.decode(errors='replace').strip()}")
    _log.info("kernel programs in force", loader=done.decode(errors="replace").strip())


async def _serve(options: Options, kernel: Kernel, stop: asyncio.Event) -> bool:
    """Serve until ``stop``; true if the mesh is to leave this node."""
    try:
        storage = Storage(options.state)
    except OSError as error:
        raise StartError(f"{error.filename}: {error.strerror}") from None
    roles = _roles(options, kernel)
    namespaces = Namespaces()
    programmer = Programmer(kernel, namespaces)
    sweeper = Sweeper(
        kernel, namespaces, lambda number: name_of(number, node.numbers), after=options.revoke_after
    )
    node = Node(
        options.node,
        storage=storage,
        programmer=programmer,
        namespaces=namespaces,
        sweeper=sweeper,
        boot=processes.boot_id(),
    )

    def register(role: api.Role, cgroup: processes.Cgroup) -> None:
        if options.daemonset:
            namespace = options.daemonset.partition("/")[0]
            vouch(role, cgroup, namespace=namespace, workloads=node.mesh.workloads)
        roles.register(role, cgroup)

    proxies = Proxies(
        node=options.node,
        enrolled=node,
        sockets=PodSockets(kernel, namespaces),
        register=register,
        maps=lambda: {"captured": kernel.captured_fd()},
    )
    node.tell(proxies)
    node.loads(lambda: _load(options))
    node.gives_roles(roles.repair)
    enrolment = EnrolmentFile(options.run)
    splicer = Splicer(kernel.splices, namespaces.borrow_if_there, on=options.splice)

    async def apply(update: Update) -> tuple[ResourceError, ...]:
        errors = await node.apply(update)
        enrolment.write(node.mesh)
        splicer.changed()
        return errors

    stream = Stream(
        Settings(
            options.controller,
            options.roots,
            options.credential,
            admin=f"{options.admin[0]}:{options.admin[1]}",
        ),
        version=lambda: node.mesh.version,
        apply=apply,
    )
    latencies = CniLatencies()
    cni = CniService(options.run, node.cni, latencies=latencies)

    def look() -> View:
        return View(
            mesh=node.mesh,
            numbers=node.numbers,
            flows=kernel.flows(),
            pressure=kernel.pressure(),
            pods=len(node.pods),
            enrolled=len(node.enrolled()),
            proxies=proxies.connected(),
            connected=stream.connected,
            destroyed=sweeper.destroyed,
            repairs=node.repairs,
            records=Records(flow_log.counts, kernel.records_lost()),
        )

    flow_log = _flow_log(options, kernel, node)
    serving = asyncio.Event()
    plugin = _plugin(options)
    registry = CollectorRegistry()
    registry.register(Collector(look, latencies))
    registry.register(SpliceMetrics(kernel.splices))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    try:
        admin = AdminServer(
            *options.admin,
            registry=registry,
            ready=lambda: (
                node.problem
                or (plugin.problem if plugin is not None else "")
                or serving.is_set()
                or "not serving plugins and proxies yet"
            ),
            json=pages(node, kernel, proxies, stream, options.pins),
            queries={"/debug/flows": flow_log.newest, **queries(node, kernel, options.pins)},
        )
    except OSError as error:
        raise StartError(f"admin address {options.admin[0]}:{options.admin[1]}: {error.strerror}") from None

    failed: list[BaseException] = []

    def on_failure(error: BaseException) -> None:
        failed.append(error)
        stop.set()

    tasks = Tasks(on_failure)
    _watch_refusals(kernel, node, sweeper)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, node.look)
    with admin:
        await node.start()
        enrolment.write(node.mesh)
        await cni.work_off_notes()
        servers = [
            Server(options.run / protocol.SOCKET_NAME, cni.serve, name="cni"),
            Server(options.run / AGENT_SOCKET, proxies.serve, name="proxies", group=options.proxy_group),
        ]
        for server in servers:
            server.start()
        serving.set()
        tasks.start(sweeper.run(), name="sweep of late connections")
        tasks.start(flow_log.run(), name="flow records")
        tasks.start(splicer.run(), name="splice")
        tasks.start(cni.watch_notes(), name="notes")
        tasks.start(Alarm(kernel.pressure).run(), name="alarm of maps that fill up")
        tasks.start(proxies.watch(), name="return of proxies")
        if options.prober == "auto":
            tasks.start(Prober(roles, options.cgroup).run(), name="prober")
        live = Live(node)
        node.on_change = live.changed
        tasks.start(live.run(), name="running pods")
        tasks.start(stream.run(), name="stream")
        if plugin is not None:
            # Now that ADD is answered; and the entry when it can be: nobody's pods wait for controllers that never came.
            tasks.start(plugin.watch(), name="CNI plugin on the node")
            tasks.start(_go_ahead(plugin, node), name="CNI entry on the node")
        _log.info(
            "agent runs", node=options.node, run=str(options.run), pid=os.getpid(), admin_port=admin.port
        )
        await stop.wait()
        leaves = bool(options.daemonset) and not failed and await leaving.for_good(options.daemonset)
        if leaves and plugin is not None:
            # Nobody puts back what is taken out, and ADD is answered until no runtime asks.
            await tasks.cancel()
            await _take_out(plugin)
        _log.info(
            "agent ends",
            mesh="leaves this node" if leaves else "stays: kernel state and proxies are as they were",
        )
        for server in servers:
            await server.close()
        await tasks.cancel()
        await node.stop()
    flow_log.close()
    asyncio.get_running_loop().remove_reader(kernel.events_fd())
    if failed:
        raise StartError(f"a task of the agent failed: {failed[0]!r}")
    return leaves


def _plugin(options: Options) -> CniNode | None:
    if options.cni_bin is None or options.cni_conf is None:
        return None
    settings = CniSettings(
        options.cni_bin,
        options.cni_conf,
        entry(options.run, options.pins, options.outside),
        host_binaries=options.cni_bin_host,
        bundle=options.cni_bundle if options.cni_bundle.exists() else None,
    )
    return CniNode(settings, holds_back=True)


async def _go_ahead(plugin: CniNode, node: Node) -> None:
    await node.informed()
    plugin.go_ahead()


async def _take_out(plugin: CniNode) -> None:
    try:
        await plugin.take_out()
    except OSError as error:
        _log.error("CNI plugin cannot be taken out", file=error.filename, reason=error.strerror)
    except CniInstallError as error:
        _log.error("CNI plugin cannot be taken out", reason=str(error))


def _roles(options: Options, kernel: Kernel) -> Roles:
    try:
        own = processes.cgroup_of("self")
    except processes.ProcessError as error:
        _log.warning("own cgroup is not known", reason=str(error))
        own = None
    roles = Roles(kernel, own=own, hierarchy=options.cgroup)
    try:
        roles.forget_gone()
        for path, role in ((options.prober_cgroup, Role.PROBER), (options.envoy_cgroup, Role.ENVOY)):
            if path is not None:
                roles.fix(processes.cgroup(path), role)
    except (KernelError, RoleError, processes.ProcessError) as error:
        raise StartError(str(error)) from None
    return roles


def _pod_name(node: Node, cookie: int) -> str:
    if cookie == 0:
        return ""
    sandbox = node.pods.sandboxes().get(cookie)
    return f"{sandbox.namespace}/{sandbox.name}" if sandbox is not None else f"namespace {cookie}"


def _flow_log(options: Options, kernel: Kernel, node: Node) -> FlowLog:
    def principal(number: int) -> str:
        label = node.numbers.label(number)
        return label.identity if label is not None else ""

    names = Names(
        name=lambda number: name_of(number, node.numbers),
        principal=principal,
        zone=lambda number: node.numbers.zone_name(number),
        pod=lambda cookie: _pod_name(node, cookie),
    )
    sink = Sink(options.flow_log, rate=options.flow_log_rate) if options.flow_log else None
    return FlowLog(kernel, names, keep=options.flow_records, sink=sink)


def _watch_refusals(kernel: Kernel, node: Node, sweeper: Sweeper) -> None:
    loop = asyncio.get_running_loop()
    refusals = Refusals(lambda number: name_of(number, node.numbers), lambda cookie: _pod_name(node, cookie))

    def read() -> None:
        events = kernel.read_events()
        refusals.tell(events, loop.time())
        sweeper.note(events)

    loop.add_reader(kernel.events_fd(), read)
