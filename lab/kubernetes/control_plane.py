"""The control plane of a cluster: etcd, kube-apiserver and, where there are nodes, controller-manager and scheduler.

Alone it is a real API server without nodes that is there in three seconds: RBAC, admission, bound tokens, CRDs, webhooks.
"""

from __future__ import annotations

import random
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lab import cgroups, state
from lab.errors import LabError
from lab.kubernetes import programs
from lab.kubernetes.service import Service
from lab.processes import wait_until

PARTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")


class ControlPlane:
    """A control plane in a folder, with its daemons in a cgroup subtree.

    As a context manager it has a folder and a cgroup of its own, listens on loopback, and leaves nothing behind.

    :param folder: where it keeps everything; ``kubeconfig`` is its administrator's.
    :param address: where the API server listens, on loopback by default; ``port`` 0 takes a free one.
    :param entering: the front of a command line, by which its daemons are started in another network namespace.
    """

    def __init__(
        self,
        folder: Path | None = None,
        cgroup: Path | None = None,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        parts: Sequence[str] = ("etcd", "kube-apiserver"),
        entering: Sequence[str] = (),
    ) -> None:
        self.address = address
        self.port = port or _free_port(address)
        self._parts = tuple(parts)
        self._entering = list(entering)
        self._state: state.State | None = None
        self._folder, self._cgroup = folder, cgroup

    def __enter__(self) -> ControlPlane:
        state.reap_stale()
        self._state = state.create()
        self._folder, self._cgroup = self._state.folder / "control-plane", self._state.cgroup
        try:
            self.configure()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End every daemon at once; remove folder and cgroups, where they are its own."""
        if self._state is not None:
            state.reap(self._state)
        else:
            cgroups.kill(self.cgroup)

    @property
    def folder(self) -> Path:
        if self._folder is None:
            raise LabError("the control plane has no folder: it is entered with `with`, or given one")
        return self._folder

    @property
    def cgroup(self) -> Path:
        if self._cgroup is None:
            raise LabError("the control plane has no cgroup: it is entered with `with`, or given one")
        return self._cgroup

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.port}"

    @property
    def kubeconfig(self) -> Path:
        return self.pki / "admin.kubeconfig"

    @property
    def certificate_authority(self) -> Path:
        return self.pki / "ca.crt"

    def service(self, name: str) -> Service:
        """One of its daemons, by the program's name (``kube-apiserver``), to stop and start."""
        return Service(
            name,
            [str(self.folder / "services" / name)],
            entering=self._entering,
            cgroup=self.cgroup / name,
            log=self.folder / f"{name}.log",
        )

    @property
    def pki(self) -> Path:
        """The folder of certificates and kubeconfigs; ``nodes/NAME`` in it is all that a node gets."""
        return self.folder / "pki"

    def configure(self, nodes: Mapping[str, str] | None = None) -> None:
        """:param nodes: name to address of those that get credentials."""
        wanted = [f"{name}={address}" for name, address in (nodes or {}).items()]
        programs.configure("pki", self.pki, f"{self.address}:{self.port}", *wanted)
        programs.configure("control-plane", self.folder, programs.folder(), self.address, self.port)

    def start(self, timeout: float = 60.0) -> None:
        """Start its daemons and wait until the API server is ready (its own roles and namespaces are there).

        :raises LabError: it was not within ``timeout`` seconds.
        """
        for part in self._parts:
            self.service(part).start()
            if part == "kube-apiserver":
                self.wait_ready(timeout)

    def wait_ready(self, timeout: float = 60.0) -> None:
        server = self.service("kube-apiserver")
        began = time.monotonic()
        wait_until(
            lambda: self.ready or (time.monotonic() - began > 5.0 and not server.running),
            timeout,
            f"API server {self.url}",
            interval=0.1,
            explain=server.tail,
        )
        if not server.running:
            raise LabError(f"the API server ended: {server.tail()}")

    @property
    def ready(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.certificate_authority))
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", context=context, timeout=2.0) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.HTTPError):
            return False

    def kubectl(
        self, *arguments: object, input: str | None = None, check: bool = True, timeout: float = 60.0
    ) -> str:
        """Run kubectl as the administrator and give back what it wrote.

        :raises LabError: it failed (with ``check``), or took over ``timeout`` seconds.
        """
        return kubectl(self.kubeconfig, *arguments, input=input, check=check, timeout=timeout)

    def apply(self, *objects: dict[str, Any]) -> None:
        """``kubectl apply`` of objects."""
        self.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(objects))


def kubectl(
    kubeconfig: Path, *arguments: object, input: str | None = None, check: bool = True, timeout: float = 60.0
) -> str:
    """Run kubectl; see :meth:`ControlPlane.kubectl`."""
    command = [str(programs.folder() / "kubectl"), f"--kubeconfig={kubeconfig}", *map(str, arguments)]
    shown = " ".join(["kubectl", *map(str, arguments)])
    try:
        done = subprocess.run(
            command,
            input=input or "",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{shown!r} took over {timeout} s") from error
    if check and done.returncode != 0:
        raise LabError(f"{shown!r} ended with status {done.returncode}: {done.stdout.strip()[-2000:]}")
    return done.stdout


def _free_port(address: str) -> int:
    """One that no outgoing connection takes while the server is restarted: below those that the kernel hands out."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(first // 2, first), 100):
        with socket.socket() as sock:
            try:
                sock.bind((address, port))
            except OSError:
                continue
            return port
    raise LabError(f"no free port on {address}")
