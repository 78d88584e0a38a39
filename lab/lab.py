"""The lab: nodes on a fabric, the mesh's processes on them, and pods made as a cluster makes them.

Owns the order in which things come and go. The machine's own namespace gets no interface, address, route or rule; all that
is made lives in namespaces held by processes of one cgroup subtree, so that whatever ends the lab ends all of it.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from lab import cgroups
from lab import state as states
from lab.capture import Capture
from lab.cluster import Cluster, PodRecord, ipv6_of
from lab.errors import LabError
from lab.mesh import ADMIN_PORTS, COMPONENTS, CONTROL_ADDRESS, CONTROLLER, MeshProcesses
from lab.metrics import Metrics
from lab.node import Node, hold
from lab.place import Place
from lab.pod import Pod
from lab.processes import Process, wait_until

__all__ = ["COMPONENTS", "CONTROL_ADDRESS", "Lab"]


class Lab:
    """A context manager: ``with Lab(nodes=2) as lab: ...``.

    :param nodes: how many.
    :param mesh: run the mesh; without, pods have Debian's CNI plugins only and nothing of ours runs.
    :param ipv6: nodes, pods, services and outsiders have IPv6 addresses too (:func:`lab.cluster.ipv6_of` their IPv4 ones, but
        for pods).
    :param arguments: more command line arguments by component.
    :param components: those to start on each node (the others can be started later).
    """

    def __init__(
        self,
        nodes: int = 2,
        *,
        mesh: bool = True,
        ipv6: bool = False,
        components: Sequence[str] = COMPONENTS,
        arguments: Mapping[str, Sequence[str]] | None = None,
        log_level: str = "info",
    ) -> None:
        self._count = nodes
        self.mesh = mesh
        self.ipv6 = ipv6
        self._components = tuple(components)
        self._arguments = dict(arguments or {})
        self._log_level = log_level
        self._outsiders = itertools.count(100)
        self._rooms = itertools.count(150)
        self._barriers = itertools.count(1)
        self._mesh: MeshProcesses | None = None
        self._holders: list[subprocess.Popen[str]] = []
        self._nodes: dict[str, Node] = {}
        self._pods: list[Pod] = []
        self._old_handler: Callable[[int, FrameType | None], Any] | int | None = None
        self.started = False

    # -- life

    def __enter__(self) -> Self:
        self.start_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and isinstance(error, Exception):
            print(self.logs(), file=sys.stderr)
        self.close()

    def start_all(self) -> None:
        """:raises LabError: something did not come up; what was made is removed again, logs are in the message."""
        if os.geteuid() != 0:
            raise LabError("the lab makes namespaces and cgroups: it needs root")
        states.reap_stale()
        began = time.monotonic()
        self.state = states.create()
        self.started = True
        atexit.register(self.close)
        self._catch_signals()
        try:
            self._build()
            #: Seconds until nodes and fabric stood, and until the mesh's processes were ready too.
            self.fabric_seconds = time.monotonic() - began
            if self.mesh:
                self._mesh = MeshProcesses(
                    self.folder,
                    self.control,
                    self.nodes,
                    room=self._room,
                    arguments=self._arguments,
                    log_level=self._log_level,
                )
                self._mesh.start_all(self._components)
            self.start_seconds = time.monotonic() - began
        except BaseException as error:
            logs = self.logs()
            self.close()
            if isinstance(error, LabError):
                raise LabError(f"{error}\n{logs}") from error
            raise

    def close(self) -> None:
        """End everything and remove it; more than once is fine."""
        if not self.started:
            return
        self.started = False
        with _uninterrupted():
            states.reap(self.state)
            for holder in self._holders:
                holder.wait()
            for pod in self._pods:
                pod.reap()
            for process in [*self.all_processes(), *(self._mesh.replaced() if self._mesh else ())]:
                process.kill()
        atexit.unregister(self.close)
        self._restore_signals()

    @property
    def id(self) -> str:
        return self.state.id

    @property
    def folder(self) -> Path:
        return self.state.folder

    @property
    def cgroup(self) -> Path:
        return self.state.cgroup

    def _catch_signals(self) -> None:
        """Make SIGTERM an exception, as SIGINT is one, so that ``with`` and ``atexit`` do their work."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:

            def end(number: int, frame: FrameType | None) -> None:
                raise SystemExit(128 + number)

            self._old_handler = signal.signal(signal.SIGTERM, end) or signal.SIG_DFL

    def _restore_signals(self) -> None:
        if self._old_handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._old_handler)
            self._old_handler = None

    # -- building

    def _build(self) -> None:
        self.cgroup.mkdir()
        (self.folder / "logs").mkdir()
        (self.folder / "nodes").mkdir()
        self.cluster = Cluster(self.folder / "config", self.folder / "staging", ipv6=self.ipv6)
        with ThreadPoolExecutor(self._count + 2) as pool:
            fabric = pool.submit(hold, "fabric", self.cgroup / "fabric")
            control = pool.submit(hold, "control", self.cgroup / "control")
            nodes = [
                pool.submit(
                    Node,
                    number,
                    cgroup=self.cgroup / f"node{number}",
                    folder=self.folder / "nodes" / f"node{number}",
                    mesh=self.mesh,
                    ipv6=self.ipv6,
                )
                for number in range(1, self._count + 1)
            ]
            for held in (fabric.result(), control.result()):
                self._holders.append(held[1])
            self.fabric, self.control = fabric.result()[0], control.result()[0]
            for future in nodes:
                node = future.result()
                self._holders.append(node.holder)
                self._nodes[node.name] = node
        self.fabric.ip("link add fabric type bridge forward_delay 0 stp_state 0\nlink set fabric up\n")
        self._join(self.control, CONTROL_ADDRESS)
        for node in self._nodes.values():
            self._join(node, node.address_on_fabric)

    def _join(self, place: Place, address: str) -> None:
        """Plug a namespace into the fabric, with routes to every node's pods."""
        holder = place.net.parent.parent.name
        self.fabric.ip(
            f"link add {place.name} type veth peer name eth0 netns {holder}\n"
            f"link set {place.name} master fabric up\n"
        )
        routes = "".join(
            f"route add {node.subnet} via {node.address_on_fabric}\n"
            for node in self._nodes.values()
            if node is not place
        )
        if self.ipv6:
            routes += f"addr add {ipv6_of(address)}/64 dev eth0 nodad\n" + "".join(
                f"route add {node.subnet6} via {ipv6_of(node.address_on_fabric)}\n"
                for node in self._nodes.values()
                if node is not place
            )
        place.ip(f"link set eth0 up\naddr add {address}/24 dev eth0\n{routes}")
        states.note(self.state, place.name, net=place.net, cgroup=place.cgroup, mount=place.mount)

    def _room(self, node: Node, name: str) -> tuple[Place, str]:
        """A network namespace on a node, with an address on the fabric, for one of the mesh's processes."""
        address = f"10.99.0.{next(self._rooms)}"
        net = node.add_netns(name)
        link = f"{node.name}-{name}"[-15:]
        self.fabric.ip(
            f"link add {link} type veth peer name eth0 netns {net}\nlink set {link} master fabric up\n"
        )
        place = Place(f"{node.name} {name}", net=net, cgroup=node.cgroup, mount=node.mount)
        place.ip(f"link set eth0 up\naddr add {address}/24 dev eth0\n")
        return place, address

    # -- what is there

    @property
    def _running(self) -> MeshProcesses:
        if self._mesh is None:
            raise LabError("this lab runs without the mesh")
        return self._mesh

    @property
    def roots(self) -> Path:
        """The mesh's public bundle, as the controller writes it."""
        return self._running.roots

    @property
    def nodes(self) -> list[Node]:
        return list(self._nodes.values())

    def node(self, name: str) -> Node:
        try:
            return self._nodes[name]
        except KeyError:
            raise LabError(f"no node {name}: there are {', '.join(self._nodes)}") from None

    @property
    def pods(self) -> list[Pod]:
        return [pod for pod in self._pods if not pod.deleted]

    # -- the cluster

    def namespace(self, name: str, labels: Mapping[str, str] | None = None, *, mesh: bool = True) -> None:
        """Write a Namespace (with the label that enrols its pods, unless ``mesh`` is false) and its default account."""
        self.cluster.namespace(name, labels, mesh=mesh and self.mesh)

    def service_account(self, name: str, namespace: str = "default") -> None:
        self.cluster.service_account(namespace, name)

    def service(
        self,
        name: str,
        port: int = 80,
        *,
        target_port: int | None = None,
        selector: Mapping[str, str] | None = None,
        namespace: str = "default",
        port_name: str = "http",
        ports: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Write a Service and give back its cluster address. The default selector is ``app: NAME``.

        :param port_name: protocol selection goes by it, as in Istio (``http``, ``tcp``, ...).
        :param ports: several ports as the manifest has them, in place of ``port``.
        """
        chosen = ports or [
            {"name": port_name, "port": port, "targetPort": target_port or port, "protocol": "TCP"}
        ]
        return self.cluster.service(
            name, namespace=namespace, selector=selector or {"app": name}, ports=chosen
        )

    def pod(
        self,
        name: str,
        *,
        node: str = "node1",
        namespace: str = "default",
        service_account: str = "default",
        labels: Mapping[str, str] | None = None,
        owner: str = "",
        ports: Sequence[int] = (),
        address: str = "",
    ) -> Pod:
        """Make a pod; it is Ready after :meth:`Pod.serve` or :meth:`Pod.set_ready`.

        :param address: ask for this pod address (one that another pod had).
        :raises CniError: the chain refused it.
        """
        self.cluster.service_account(namespace, service_account)
        record = PodRecord(
            namespace=namespace,
            name=name,
            node=node,
            service_account=service_account,
            labels={"app": name} if labels is None else labels,
            owner=owner or name,
            ports=ports,
        )
        pod = Pod(record, self.node(node), self.cluster, address=address)
        self._pods.append(pod)
        states.note(self.state, name, net=pod.net, cgroup=pod.cgroup)
        return pod

    def outsider(self, name: str = "outsider") -> Place:
        """A machine on the fabric that is no node and has nothing of the mesh (10.99.0.100 and up)."""
        place, holder = hold(name, self.cgroup / name)
        self._holders.append(holder)
        self._join(place, f"10.99.0.{next(self._outsiders)}")
        return place

    def apply(
        self, source: Path | str | Mapping[str, Any] | Sequence[Mapping[str, Any]], name: str = ""
    ) -> str:
        """Put a user's file in force, see :meth:`lab.cluster.Cluster.apply`."""
        return self.cluster.apply(source, name)

    def withdraw(self, name: str) -> None:
        self.cluster.withdraw(name)

    @contextlib.contextmanager
    def applied(
        self, source: Path | str | Mapping[str, Any] | Sequence[Mapping[str, Any]], name: str = ""
    ) -> Iterator[str]:
        """A user's file in force everywhere, for as long as the block runs."""
        file = self.apply(source, name)
        try:
            self.settle()
            yield file
        finally:
            with contextlib.suppress(LabError):
                self.withdraw(file)
            self.settle()

    # -- processes

    def process(self, node: str, component: str = "") -> Process:
        """The process of a node's component; ``process("controlplane")`` is the controller's."""
        return self._running.process(node, component)

    def all_processes(self) -> list[Process]:
        return self._mesh.all() if self._mesh is not None else []

    def processes_of(self, node: str, component: str) -> list[int]:
        """Process ids of a component and its children."""
        return cgroups.processes(self._running.cgroup(node, component))

    def kill(self, node: str, component: str = "") -> None:
        """SIGKILL."""
        self.process(node, component).kill()

    def stop(self, node: str, component: str = "", timeout: float = 10.0) -> int:
        """SIGTERM, and its exit status."""
        return self.process(node, component).stop(timeout)

    def start(self, node: str, component: str = "", *, ready: bool = True) -> None:
        self.process(node, component).start()
        if ready:
            self._running.wait_ready(node, component)

    def surge(self, node: str, component: str, *, ready: bool = True) -> Process:
        """Start a proxy's successor beside it, as a rolling update does; the old one is the caller's to end.

        From now on :meth:`process` and the pages are the new one's.
        """
        old = self._running.replace(node, component)
        if ready:
            self._running.wait_ready(node, component)
        return old

    def mycel(
        self, *arguments: str, timeout: float = 30.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run the ``mycel`` command beside the controller."""
        controller = f"MYCEL_CONTROLLER={CONTROL_ADDRESS}:{ADMIN_PORTS[CONTROLLER]}"
        command = ["/usr/bin/env", controller, str(Path(sys.executable).parent / "mycel"), *arguments]
        return self.control.run(command, timeout=timeout, check=check)

    # -- looking

    def get(self, node: str, component: str = "", path: str = "/") -> bytes:
        """A page of a component's admin server. :raises LabError: no answer, or another status than 200."""
        return self._running.get(node, component, path)

    def get_json(self, node: str, component: str = "", path: str = "/") -> Any:
        return self._running.get_json(node, component, path)

    def metrics(self, node: str, component: str = "") -> Metrics:
        """What a component's ``/metrics`` says at this moment."""
        return self._running.metrics(node, component)

    def logs(self, node: str = "", component: str = "", lines: int = 60) -> str:
        """The end of one component's log, or of all of them."""
        if node:
            return self.process(node, component).tail(lines)
        return self._mesh.logs(lines) if self._mesh is not None else ""

    def capture(self, node: str | None = None) -> Capture:
        """Record every packet on the fabric (as one node's cable carries it, if a node is named)."""
        names = [node] if node else list(self._nodes)
        return Capture(self.fabric.net, names)

    def probe(self, pod: Pod, port: int, timeout: float = 2.0, *, address: str = "") -> bool:
        """A TCP probe as the kubelet of the pod's node makes it: from the node, by a process of the kubelet's cgroup."""
        done = pod.node.run(
            pod.node.app("dial", address or pod.address, port, "--timeout", timeout),
            cgroup=pod.node.kubelet,
            check=False,
            timeout=timeout + 5,
        )
        return done.returncode == 0

    def wait(
        self,
        condition: Callable[[], object],
        timeout: float,
        what: str,
        *,
        interval: float = 0.02,
        explain: Callable[[], object] | None = None,
    ) -> None:
        """Wait for something to become true. :raises LabError: it did not."""
        wait_until(condition, timeout, what, interval=interval, explain=explain)

    def settle(self, timeout: float = 10.0, components: Sequence[str] = COMPONENTS) -> None:
        """Wait until everything that was written is in force on every node, or refused with a reason.

        :param components: wait for these only.

        A Service that nobody dials marks the end of what was written: once the controller has it, it has all before it.
        """
        if not self.mesh:
            return
        number = next(self._barriers)
        self.cluster.service(
            "lab-barrier",
            namespace="lab-barrier",
            selector={"app": "lab-barrier"},
            ports=[{"name": "tcp", "port": number, "protocol": "TCP"}],
            address="10.96.255.254",
        )

        mesh = self._running

        def compiled() -> bool:
            for resource in mesh.get_json(CONTROLLER, path="/debug/snapshot")["resources"]:
                if resource.get("type") == "service" and resource["name"] == "lab-barrier":
                    return bool(resource["ports"][0]["port"] == number)
            return False

        def behind() -> list[str]:
            return mesh.behind(components)

        wait_until(compiled, timeout, "the controller has read what was written")
        wait_until(lambda: not behind(), timeout, "every node has what was written", explain=behind)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let clean-up finish: SIGINT and SIGTERM wait until it is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, wanted)
