"""A node of the cluster: a machine with containerd, kubelet and kube-proxy on it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from lab import cgroups
from lab.errors import LabError
from lab.kubernetes import programs
from lab.kubernetes.machine import Machine
from lab.kubernetes.service import Service
from lab.processes import wait_until

DAEMONS = ("containerd", "kubelet", "kube-proxy")
#: Where a machine has the programs, and how they are named there.
PROGRAMS = "/opt/kubernetes/bin"


class Node(Machine):
    """One node.

    :param number: gives it its address on the fabric (10.249.0.10 + number) and its pods' subnet (10.244.NUMBER.0/24).
    """

    def __init__(
        self, number: int, *, folder: Path, cgroup: Path, nodes: int, control: Path, python: bool = False
    ) -> None:
        super().__init__(
            f"node{number}", folder=folder, cgroup=cgroup, programs=programs.folder(), python=python
        )
        self.number = number
        self.address = address_of(number)
        self.subnet = f"10.244.{number}.0/24"
        self.zone = f"zone-{number}"
        self._nodes = nodes
        self._control = control
        # An overlay cannot lie on another one: inside of a container the layers are copied.
        self._snapshotter = "native" if _file_system(folder.parent) == "overlay" else "overlayfs"

    def service(self, name: str, program: str = "") -> Service:
        """One of its daemons: containerd, kubelet or kube-proxy."""
        return super().service(name, program or f"/etc/kubernetes/services/{name}")

    def configure(self, credentials: Path) -> None:
        """:param credentials: what ``pki`` made for this node."""
        self.prepare()
        environment = {**os.environ, "MYCEL_PROGRAMS": str(programs.folder())}
        programs.configure(
            "node",
            *(
                self.disk,
                PROGRAMS,
                credentials,
                self.name,
                self.address,
                self.number,
                self.zone,
                self._snapshotter,
            ),
            environment=environment,
        )

    def start(
        self, images: Sequence[Path] = (), *, wait_for_server: Callable[[], None] = lambda: None
    ) -> None:
        """Switch it on and start its daemons; returns before the API server calls it ready.

        :param images: archives that containerd gets before kubelet starts.
        :param wait_for_server: called before kubelet starts; one that finds no API server waits ever longer to ask again.
        """
        self.switch_on()
        self._connect()
        self.service("containerd").start()
        self.wait_containerd()
        for image in images:
            self.load(image)
        wait_for_server()
        for daemon in ("kubelet", "kube-proxy"):
            self.service(daemon).start()

    def stop(self) -> None:
        """Pull its plug: containerd, kubelet and containers die at once; pins, links, ``/run`` and pods' namespaces go."""
        self.switch_off()

    def reboot(self) -> None:
        """Off and on again; what was on its disk is there, and nothing else."""
        self.stop()
        self.start()

    def load(self, archive: Path, timeout: float = 120.0) -> None:
        """Give containerd the images of an archive (OCI or docker), as a pull would.

        :raises LabError: it does not take them.
        """
        wanted = (f"{PROGRAMS}/ctr", "-n", "k8s.io", "images", "import", "--local")
        with open(archive, "rb") as file:
            done = subprocess.run(
                self.command([*wanted, "--snapshotter", self._snapshotter, "-"]),
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
                check=False,
            )
        if done.returncode != 0:
            raise LabError(f"{self.name} does not take {archive}: {done.stdout[-1000:]}")

    def images(self) -> list[str]:
        """The names of the images it has."""
        output = self.run([f"{PROGRAMS}/ctr", "-n", "k8s.io", "images", "list", "-q"]).stdout
        return [name for name in output.split() if "@" not in name and not name.startswith("sha256:")]

    def pod_pids(self, uid: str) -> list[int]:
        """Processes of a pod, as this machine numbers them, told by the pod's cgroup (containers' only)."""
        found: list[int] = []
        for folder, _, _ in os.walk(self.cgroup):
            if f"pod{uid}" in folder:
                found += [int(pid) for pid in Path(folder, "cgroup.procs").read_text().split()]
        return found

    def pod_command(self, uid: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs a program in a pod of this node without kubelet and API server.

        :param argv: its first word is an absolute path, by which the container is told from the pod's sandbox.
        :raises LabError: no container of the pod has it.
        """
        for pid in self.pod_pids(uid):
            root = Path(f"/proc/{pid}/root")
            if (root / argv[0].lstrip("/")).exists():
                group = next(
                    line
                    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()
                    if line.startswith("0::")
                )
                joining = cgroups.joining(cgroups.root() / group[4:])
                kinds = ("--net", "--mount", "--uts", "--ipc", "--pid")
                return [*joining, "/usr/bin/nsenter", f"--target={pid}", *kinds, "--", *argv]
        raise LabError(f"no container of pod {uid} on {self.name} has {argv[0]}")

    def wait_containerd(self, timeout: float = 60.0) -> None:
        """:raises LabError: containerd does not answer within ``timeout`` seconds; a kubelet that starts before it ends."""
        wait_until(
            lambda: self.run([f"{PROGRAMS}/ctr", "version"], check=False).returncode == 0,
            timeout,
            f"{self.name}: containerd answers",
            interval=0.1,
            explain=self.service("containerd").tail,
        )

    def _connect(self) -> None:
        """Its cable to the fabric, its address, and the ways to the other nodes' pods."""
        link = f"fabric{self.number}"
        init = self.init
        _ip(
            self._control,
            f"link add {link} type veth peer name eth0 netns {init}",
            f"link set {link} master fabric up",
        )
        others = [number for number in range(1, self._nodes + 1) if number != self.number]
        _ip(
            Path(f"/proc/{init}/ns/net"),
            f"addr add {self.address}/24 dev eth0",
            "link set eth0 up",
            "route add default via 10.249.0.1",
            *(f"route add 10.244.{number}.0/24 via {address_of(number)}" for number in others),
        )


def address_of(number: int) -> str:
    return f"10.249.0.{10 + number}"


def _ip(namespace: Path, *lines: str) -> None:
    done = subprocess.run(
        ["/usr/bin/nsenter", f"--net={namespace}", "--", "/usr/sbin/ip", "-batch", "-"],
        input="\n".join(lines) + "\n",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise LabError(f"ip {lines}: {done.stdout}")


def _file_system(folder: Path) -> str:
    done = subprocess.run(
        ["/usr/bin/findmnt", "--json", "--target", str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    return str(json.loads(done.stdout)["filesystems"][0]["fstype"])
