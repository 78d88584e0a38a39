"""The mesh's own processes in a lab: how they are started, ended, replaced and looked at.

Owns command lines, credentials and privileges. As in a cluster the agent is root on the node with few capabilities, and the
proxies are somebody without any, each in network, PID and cgroup of its own.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from lab import cgroups, namespaces, reach
from lab.errors import LabError
from lab.metrics import Metrics
from lab.node import RUN, Node, python_module
from lab.place import Place
from lab.processes import Process, wait_until

CONTROL_ADDRESS = "10.99.0.1"
CONTROLLER = "controlplane"
COMPONENTS = ("agent", "nodeproxy", "l7proxy")
ADMIN_PORTS = {CONTROLLER: 15014, "agent": 15020, "nodeproxy": 15021, "l7proxy": 15090}
#: The agent's short list (see ARCHITECTURE.md); everything else of the mesh runs without any.
AGENT_CAPABILITIES = ("bpf", "net_admin", "sys_admin", "perfmon", "sys_ptrace")
#: Who the proxies are, and the group by which they get at what the agent shares with them.
PROXY = 15008
#: Seconds for all processes to be ready; compiling the kernel programs is most of it.
START_TIMEOUT = 60.0


class Seat(NamedTuple):
    """Where a process runs, and at which address its admin server answers."""

    place: Place
    address: str
    cgroup: Path


class MeshProcesses:
    """The controller beside the fabric, and agent, node proxy and l7proxy on each node.

    :param folder: the lab's.
    :param room: makes a network namespace on a node, by a name, and gives its place and address.
    :param arguments: more command line arguments by component.
    """

    def __init__(
        self,
        folder: Path,
        control: Place,
        nodes: Sequence[Node],
        *,
        room: Callable[[Node, str], tuple[Place, str]],
        arguments: Mapping[str, Sequence[str]],
        log_level: str,
    ) -> None:
        self._folder = folder
        self._control = control
        self._nodes = {node.name: node for node in nodes}
        self._room = room
        self._numbers = itertools.count(1)
        self._arguments = arguments
        self._log_level = log_level
        self._write_credentials()
        self._processes: dict[tuple[str, str], Process] = {(CONTROLLER, ""): self._make_controller()}
        self._seats = {(CONTROLLER, ""): Seat(control, CONTROL_ADDRESS, control.cgroup)}
        self._replaced: list[Process] = []
        for node in nodes:
            for component in COMPONENTS:
                self._seats[node.name, component] = self._seat(node, component)
                self._processes[node.name, component] = self._make(node, component)

    # -- life

    def start_all(self, components: Sequence[str]) -> None:
        """Start the controller, then the named components everywhere, and wait until all are ready."""
        controller = self.process(CONTROLLER)
        controller.start()
        wait_until(lambda: _alive(controller) and self.roots.exists(), START_TIMEOUT, f"{self.roots} exists")
        started = [(CONTROLLER, "")]
        for (name, component), process in self._processes.items():
            if component in components:
                process.start()
                started.append((name, component))
        for name, component in started:
            self.wait_ready(name, component)

    def wait_ready(self, name: str, component: str = "", timeout: float = START_TIMEOUT) -> None:
        """Wait until a process says that it is ready. :raises LabError: it ended, or is not in time."""
        process = self.process(name, component)
        wait_until(
            lambda: _alive(process) and self._answers(name, component, "/healthz/ready"),
            timeout,
            f"{process.name} is ready",
            explain=process.tail,
        )

    def replace(self, name: str, component: str) -> Process:
        """Start a proxy's successor beside it (it may not be ready yet), and give back the old one, which goes on to run."""
        old = self.process(name, component)
        self._replaced.append(old)
        node = self._nodes[name]
        self._seats[name, component] = self._seat(node, component)
        process = self._processes[name, component] = self._make(node, component)
        process.start()
        return old

    # -- what is there

    @property
    def roots(self) -> Path:
        """The mesh's public bundle, as the controller writes it."""
        return self._folder / "control" / "roots.pem"

    def process(self, name: str, component: str = "") -> Process:
        """The controller's (``"controlplane"``), or that of a node's component."""
        try:
            return self._processes[name, component]
        except KeyError:
            raise LabError(f"no process {name} {component}") from None

    def all(self) -> list[Process]:
        return list(self._processes.values())

    def replaced(self) -> list[Process]:
        """The predecessors."""
        return self._replaced

    def cgroup(self, name: str, component: str) -> Path:
        return self._seats[name, component].cgroup

    def on_nodes(self) -> list[tuple[Node, str, Process]]:
        """Every node's processes, with node and component."""
        return [
            (self._nodes[name], component, process)
            for (name, component), process in self._processes.items()
            if component
        ]

    # -- looking

    def get(self, name: str, component: str = "", path: str = "/") -> bytes:
        """A page of a process' admin server. :raises LabError: no answer, or another status than 200."""
        try:
            status, body = self._get(name, component, path)
        except (OSError, http.client.HTTPException) as error:
            raise LabError(f"{name} {component} {path}: {error!r}") from error
        if status != 200:
            raise LabError(f"{name} {component} {path}: status {status}: {body[:500]!r}")
        return body

    def get_json(self, name: str, component: str = "", path: str = "/") -> Any:
        return json.loads(self.get(name, component, path))

    def metrics(self, name: str, component: str = "") -> Metrics:
        return Metrics(self.get(name, component, "/metrics").decode())

    def logs(self, lines: int) -> str:
        """The end of every log."""
        return "\n".join(f"--- {process.name}\n{process.tail(lines)}" for process in self.all())

    def behind(self, components: Sequence[str]) -> list[str]:
        """Which of the running processes do not have what the controller serves, and what they have."""
        page = self.get_json(CONTROLLER, path="/debug/clients")
        acked = {(client["node"], client["component"]): client["version_acked"] for client in page["clients"]}
        found = []
        for node, component, process in self.on_nodes():
            has = acked.get((node.name, component), "no stream")
            if component in components and process.running and has != page["version"]:
                found.append(f"{process.name} has {has[:12]}, not {page['version'][:12]}")
        return found

    def _answers(self, name: str, component: str, path: str) -> bool:
        try:
            return self._get(name, component, path, timeout=2.0)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _get(self, name: str, component: str, path: str, timeout: float = 5.0) -> tuple[int, bytes]:
        place, address, _ = self._seats[name, component]
        port = ADMIN_PORTS[component or name]
        connection = http.client.HTTPConnection(address, port, timeout=timeout)
        try:
            connection.sock = namespaces.connect(place.net, (address, port), timeout)
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    # -- making

    def _write_credentials(self) -> None:
        """A token for each node, and its SHA-256 for the controller."""
        credentials = self._folder / "credentials"
        credentials.mkdir()
        for node in self._nodes.values():
            token = secrets.token_urlsafe(32)
            path = node.folder / "credential"
            path.touch(mode=0o600)
            path.write_text(token)
            os.chown(path, 0, PROXY)
            path.chmod(0o640)
            (credentials / node.name).write_text(sha256(token.encode()).hexdigest())

    def _make_controller(self) -> Process:
        state = self.roots.parent
        # The bundle in it is for everybody; what is not has modes of its own.
        state.mkdir(mode=0o711)
        arguments = [
            *("--config", str(self._folder / "config"), "--state", str(state)),
            *("--listen", f"{CONTROL_ADDRESS}:15012"),
            *("--admin", f"{CONTROL_ADDRESS}:{ADMIN_PORTS[CONTROLLER]}"),
            *("--credentials", str(self._folder / "credentials"), "--server-name", CONTROL_ADDRESS),
        ]
        return self._process(CONTROLLER, CONTROLLER, self._control.cgroup, self._control, (), arguments)

    def _seat(self, node: Node, component: str) -> Seat:
        number = next(self._numbers)
        # Envoy's dials come to the node proxy over the loopback interface that both have.
        with_envoy = component == "nodeproxy" and "--envoy" in self._arguments.get(component, ())
        if component == "agent" or with_envoy:
            return Seat(node, node.address_on_fabric, node.top / "mycel" / component)
        cgroup = node.top / "mycel" / f"{component}-{number}"
        cgroup.mkdir()
        place, address = self._room(node, f"{component}-{number}")
        return Seat(place, address, cgroup)

    def _make(self, node: Node, component: str) -> Process:
        seat = self._seats[node.name, component]
        arguments = [
            *("--node", node.name, "--run", str(RUN), "--controller", f"{CONTROL_ADDRESS}:15012"),
            *("--roots", str(self.roots), "--credential", str(node.folder / "credential")),
            *("--admin", f"{seat.address}:{ADMIN_PORTS[component]}"),
        ]
        if component == "agent":
            arguments += [
                *("--state", "/var/lib/mycel", "--pins", "/sys/fs/bpf/mycel", "--cgroup", str(node.top)),
                *("--prober-cgroup", str(node.kubelet), "--envoy-cgroup", str(node.top / "envoy")),
            ]
        if component == "l7proxy":
            arguments += ["--access-log", "-"]
        name = f"{node.name} {component}"
        if component == "agent":
            return self._process(
                name, component, seat.cgroup, seat.place, ("--groups", str(PROXY)), arguments
            )
        user = ("--reuid", str(PROXY), "--regid", str(PROXY), "--clear-groups", "--no-new-privs")
        return self._process(name, component, seat.cgroup, seat.place, user, arguments, contained=True)

    def _process(
        self,
        name: str,
        component: str,
        cgroup: Path,
        place: Place,
        user: Sequence[str],
        arguments: Sequence[str],
        *,
        contained: bool = False,
    ) -> Process:
        """``contained``: the first process of a PID namespace."""
        kept = "".join(f",+{capability}" for capability in AGENT_CAPABILITIES) if component == "agent" else ""
        command = [
            *("/usr/bin/setpriv", f"--bounding-set=-all{kept}", "--inh-caps=-all", *user, "--"),
            *python_module(component),
            *arguments,
            *("--log-format", "text", "--log-level", self._log_level),
            *self._arguments.get(component, ()),
        ]
        if contained:
            front = ("/usr/bin/unshare", "--pid", "--fork", "--kill-child", "--")
            command = place.command([*front, *cgroups.joining(cgroup), *command])
        else:
            command = place.command(command, cgroup=cgroup)
        log = self._folder / "logs" / f"{name.replace(' ', '-')}.log"
        environment = {"BCC_KERNEL_SOURCE": str(reach.cache() / "headers/current"), **os.environ}
        return Process(name, command, log, environment, contained=contained)


def _alive(process: Process) -> bool:
    """:raises LabError: it has ended."""
    if not process.running:
        raise LabError(f"{process.name} ended with status {process.exit_status}:\n{process.tail()}")
    return True
