"""The cluster lab: a control plane and nodes on a fabric of their own, made and taken away as one.

Owns the order in which things come, and what belongs to a cluster: a folder, a cgroup subtree, and one link in the
machine's own network namespace, by which the API server is reached (``mycel-k8s0`` and an address of 10.250.0.0/16).
Everything else lives in namespaces that processes of the subtree hold, so that whatever ends these ends all of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import state
from lab.errors import LabError
from lab.kubernetes import programs
from lab.kubernetes.access import Kubernetes
from lab.kubernetes.control_plane import PARTS, ControlPlane
from lab.kubernetes.node import Node, _ip, address_of
from lab.kubernetes.service import Service
from lab.processes import wait_until

PREFIX = "k8s-"
LINK = "mycel-k8s"
#: What the masquerading of the control plane's namespace is for: pods that talk to a server on the machine.
_OUTWARD = (
    "add table ip lab; add chain ip lab out { type nat hook postrouting priority 100; }; "
    "add rule ip lab out oifname uplink masquerade"
)


@dataclass(frozen=True)
class Description:
    """What another process must know to work with a running cluster."""

    name: str
    nodes: int
    number: int  #: of the link: the machine is 10.250.NUMBER.1, the API server 10.250.NUMBER.2
    python: bool
    ready: bool = False


class Cluster(Kubernetes):
    """A cluster; a context manager that starts it and leaves nothing behind.

    :param name: tells several clusters apart; short, for it is part of paths.
    :param python: nodes have the machine's ``python3``; without it they have none at all.
    :raises LabError: a cluster of this name runs already.
    """

    def __init__(self, name: str = "", *, nodes: int = 2, python: bool = False) -> None:
        self.name = name or f"p{os.getpid()}"
        self.start_seconds = 0.0
        self._count = nodes
        self._python = python
        self._number = -1
        self._state: state.State | None = None

    @classmethod
    def attach(cls, name: str) -> Cluster:
        """A running cluster that another process owns.

        :raises LabError: there is none of this name.
        """
        for lab in state.labs():
            if lab.id == PREFIX + name and not lab.stale:
                description = _description(lab)
                if description is None or not description.ready:
                    raise LabError(f"cluster {name} is not ready")
                cluster = cls(name, nodes=description.nodes, python=description.python)
                cluster._state, cluster._number = lab, description.number
                return cluster
        running = ", ".join(names()) or "none"
        raise LabError(f"no cluster {name} runs (there are: {running})")

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- what is there

    @property
    def state(self) -> state.State:
        if self._state is None:
            raise LabError(f"cluster {self.name} was not started")
        return self._state

    @property
    def folder(self) -> Path:
        return self.state.folder

    @property
    def nodes(self) -> list[Node]:
        return [
            Node(
                number,
                folder=self.folder / f"node{number}",
                cgroup=self.state.cgroup / f"node{number}",
                nodes=self._count,
                control=self.network,
                python=self._python,
            )
            for number in range(1, self._count + 1)
        ]

    def node(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise LabError(f"cluster {self.name} has no node {name}")

    @property
    def control_plane(self) -> ControlPlane:
        """Its daemons, to stop and start: ``control_plane.service("kube-apiserver").stop()``."""
        return ControlPlane(
            self.folder / "control-plane",
            self.state.cgroup / "control",
            address=self.address,
            port=6443,
            parts=PARTS,
            entering=["/usr/bin/nsenter", f"--net={self.network}", "--"],
        )

    @property
    def address(self) -> str:
        """Of the API server, for this machine and for the nodes."""
        return f"10.250.{self._number}.2"

    @property
    def machine_address(self) -> str:
        """Of this machine, for the API server, nodes and pods: what listens there can be their webhook or peer."""
        return f"10.250.{self._number}.1"

    @property
    def kubeconfig(self) -> Path:
        return self.control_plane.kubeconfig

    @property
    def network(self) -> Path:
        """The network namespace of control plane and fabric."""
        pids = self._holder().pids
        if not pids:
            raise LabError(f"the control plane of cluster {self.name} has no network")
        return Path(f"/proc/{pids[0]}/ns/net")

    # -- work with it

    def load(self, *archives: Path) -> None:
        """Give every node the images of the archives."""
        with ThreadPoolExecutor() as pool:
            loads = [pool.submit(node.load, archive) for archive in archives for node in self.nodes]
            for load in loads:
                load.result()

    def wait_nodes(self, timeout: float = 120.0) -> None:
        """:raises LabError: not every node is ready within ``timeout`` seconds."""
        wait_until(
            lambda: self.ready_nodes() == {node.name for node in self.nodes},
            timeout,
            f"all nodes of cluster {self.name} are ready",
            interval=0.2,
            explain=self._nodes_seen,
        )

    def _nodes_seen(self) -> str:
        tails = [f"{node.name}: {node.service('kubelet').tail(5)}" for node in self.nodes]
        return "\n".join([self.kubectl("get", "nodes", "-o", "wide", check=False), *tails])

    # -- coming and going

    def start(self) -> None:
        """Start it; returns when all nodes are ready and names resolve.

        :raises LabError: it did not come up. Nothing of it is left then.
        """
        began = time.monotonic()
        programs.folder()
        state.reap_stale()
        try:
            self._state = state.create(PREFIX + self.name)
        except FileExistsError:
            raise LabError(f"a cluster {self.name} runs already") from None
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.monotonic() - began
        self._describe(ready=True)

    def close(self) -> None:
        """End it, whoever owns it, and remove what belongs to it."""
        if self._state is None:
            return
        state.reap(self._state)
        if self._number >= 0:
            # It goes with its peer's namespace, which takes the kernel a moment.
            _machine_ip("link", "del", f"{LINK}{self._number}", check=False)
        self._state = None

    def _start(self) -> None:
        _allow_watchers()
        images = programs.images()
        self._make_network()
        self._describe(ready=False)
        plane, nodes = self.control_plane, self.nodes
        plane.configure({node.name: node.address for node in nodes})

        def bring_up(node: Node) -> None:
            node.configure(plane.pki / "nodes" / node.name)
            node.start(images, wait_for_server=plane.wait_ready)

        with ThreadPoolExecutor() as pool:
            work = [pool.submit(plane.start), *(pool.submit(bring_up, node) for node in nodes)]
            for future in work:
                future.result()
        self.apply(programs.PROVISION / "addons/coredns.yaml")
        self.wait_nodes()
        self.kubectl(
            "rollout", "status", "-n", "kube-system", "deployment/coredns", "--timeout=60s", timeout=70
        )

    def _make_network(self) -> None:
        holder = self._holder()
        holder.start()
        wait_until(
            lambda: any(_entered(pid) for pid in holder.pids), 5.0, "a network namespace", interval=0.005
        )
        pid = holder.pids[0]
        # The kernel refuses a name twice: whoever makes the link has the number.
        for number in range(250):
            done = _machine_ip(
                *(
                    "link",
                    "add",
                    f"{LINK}{number}",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "uplink",
                    "netns",
                    str(pid),
                ),
                check=False,
            )
            if done.returncode == 0:
                self._number = number
                break
            if "exists" not in done.stdout:
                raise LabError(f"no link to the control plane: {done.stdout}")
        else:
            raise LabError("250 clusters are running")
        _machine_ip("link", "set", f"{LINK}{self._number}", "alias", self.state.alias)
        _machine_ip("addr", "add", f"{self.machine_address}/30", "dev", f"{LINK}{self._number}")
        _machine_ip("link", "set", f"{LINK}{self._number}", "up")
        routes = [f"route add 10.244.{n}.0/24 via {address_of(n)}" for n in range(1, self._count + 1)]
        _ip(
            self.network,
            "link set lo up",
            f"addr add {self.address}/30 dev uplink",
            "link set uplink up",
            f"route add default via {self.machine_address}",
            # An address of its own: a bridge takes that of one of its ports, and changes it when a node is switched off.
            "link add fabric address 02:4d:79:63:65:6c type bridge",
            "addr add 10.249.0.1/24 dev fabric",
            "link set fabric up",
            *routes,
        )
        inside = ["/usr/bin/nsenter", f"--net={self.network}", "--", "/bin/sh", "-ec"]
        subprocess.run(
            [*inside, 'echo 1 >/proc/sys/net/ipv4/ip_forward; nft "$1"', "sh", _OUTWARD], check=True
        )

    def _holder(self) -> Service:
        return Service(
            "network",
            ["/usr/bin/unshare", "--net", "--", "/bin/sh", "-c", "exec sleep infinity"],
            cgroup=self.state.cgroup / "network",
            log=self.folder / "network.log",
        )

    def _describe(self, *, ready: bool) -> None:
        description = Description(self.name, self._count, self._number, self._python, ready)
        temporary = self.folder / ".cluster.json"
        temporary.write_text(json.dumps(asdict(description)))
        temporary.rename(self.folder / "cluster.json")


def names() -> list[str]:
    """The clusters that run on this machine."""
    return [
        lab.id.removeprefix(PREFIX) for lab in state.labs() if lab.id.startswith(PREFIX) and not lab.stale
    ]


def down(name: str, timeout: float = 30.0) -> bool:
    """End a cluster, its owner first (it cleans up itself); whether there was one."""
    for lab in state.labs():
        if lab.id != PREFIX + name:
            continue
        if lab.pid != os.getpid() and _description(lab) is not None and not lab.stale:
            with contextlib.suppress(ProcessLookupError):
                os.kill(lab.pid, signal.SIGTERM)
            deadline = time.monotonic() + timeout
            while lab.folder.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        if lab.folder.exists():
            state.reap(lab)
        return True
    return False


def _description(lab: state.State) -> Description | None:
    try:
        return Description(**json.loads((lab.folder / "cluster.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _allow_watchers() -> None:
    """The kernel's usual 128 inotify instances of one user are used up by two or three clusters; this stays raised."""
    limit = Path("/proc/sys/fs/inotify/max_user_instances")
    if int(limit.read_text()) < 4096:
        limit.write_text("8192")


def _entered(pid: int) -> bool:
    """Whether the process is in another network namespace than this one."""
    try:
        return bool(os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net"))
    except OSError:
        return False


def _machine_ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["/usr/sbin/ip", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if check and done.returncode != 0:
        raise LabError(f"ip {' '.join(arguments)}: {done.stdout}")
    return done
