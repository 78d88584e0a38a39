"""A pod: what runtime, kubelet and cluster do for it between its manifest and its end."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from lab import cgroups
from lab.cluster import Cluster, PodRecord
from lab.errors import LabError
from lab.node import Node
from lab.place import Place
from lab.processes import wait_until
from lab.runtime import IFNAME


class Pod(Place):
    """Made in the order in which a cluster does it: manifest (Pending), sandbox, CNI ADD, processes, address, Ready."""

    def __init__(self, record: PodRecord, node: Node, cluster: Cluster, *, address: str = "") -> None:
        """:param address: ask the address management for this one. :raises CniError: the chain refused the pod."""
        self.record = record
        self.node = node
        self._cluster = cluster
        self._container = f"{record.name}-{record.uid[:8]}"
        self._args = {
            "IgnoreUnknown": "1",
            "K8S_POD_NAMESPACE": record.namespace,
            "K8S_POD_NAME": record.name,
            "K8S_POD_INFRA_CONTAINER_ID": self._container,
            "K8S_POD_UID": record.uid,
        }
        if address:
            self._args["IP"] = address
        self.deleted = False
        self._daemons: list[subprocess.Popen[str]] = []
        cgroup = node.top / "kubepods" / f"pod{record.uid}"
        cgroup.mkdir()
        cluster.put(record.manifest())
        path = node.add_netns(self._container)
        super().__init__(f"{record.namespace}/{record.name}", net=path, cgroup=cgroup)
        started = time.monotonic()
        try:
            result = node.runtime.add(self._container, self._netns, self._args)
        except LabError:
            self._remove_sandbox()
            cluster.remove("Pod", record.namespace, record.name)
            raise
        #: Seconds that the whole chain's ADD took.
        self.add_seconds = time.monotonic() - started
        addresses = [ip["address"].partition("/")[0] for ip in result["ips"]]
        self.address: str = addresses[0]
        #: Empty in a lab without IPv6.
        self.address6: str = next((address for address in addresses if ":" in address), "")
        self._announce(
            next(i["mac"] for i in result["interfaces"] if i.get("sandbox") and i["name"] == IFNAME)
        )
        record.address, record.address6 = self.address, self.address6
        cluster.put(record.manifest())

    @property
    def uid(self) -> str:
        return self.record.uid

    @property
    def log(self) -> Path:
        """Output of the pod's :meth:`serve` processes."""
        return self.node.folder / f"pod-{self._container}.log"

    @property
    def _netns(self) -> str:
        return f"/run/netns/{self._container}"

    def _announce(self, mac: str) -> None:
        """Tell the neighbours that the address has moved here: a gratuitous ARP request (RFC 5227, section 3).

        The bridge plugin of Debian 12 does not. Without it, whoever spoke to the address' last owner would send to that
        one's interface until the entry is stale, which has nothing to do with what the lab is for.
        """
        sender = bytes.fromhex(mac.replace(":", "")) + socket.inet_aton(self.address)
        target = bytes(6) + socket.inet_aton(self.address)
        frame = b"\xff" * 6 + sender[:6] + b"\x08\x06" + b"\x00\x01\x08\x00\x06\x04\x00\x01" + sender + target
        with self.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind((IFNAME, 0))
            sock.send(frame)

    def serve(self, command: Sequence[str], *ports: int, timeout: float = 10.0) -> subprocess.Popen[str]:
        """Start a long-lived process, wait until it listens on the ports, then the pod is Ready."""
        with open(self.log, "a") as log:
            process = self.popen(command, stdout=log, stderr=log)
        self._daemons.append(process)

        def ready() -> bool:
            if process.poll() is not None:
                raise LabError(f"{self.name}: {' '.join(command)!r} ended: {self.log.read_text()[-2000:]}")
            return all(self.listening(port) for port in ports)

        wait_until(ready, timeout, f"{self.name}: {' '.join(command)!r} listens on {ports}")
        self.set_ready(True)
        return process

    def set_ready(self, ready: bool) -> None:
        self.record.ready = ready
        self._cluster.put(self.record.manifest())

    def check(self) -> None:
        """CNI CHECK. :raises CniError: the pod is no longer connected as it was."""
        self.node.runtime.check(self._container)

    def kill_processes(self) -> None:
        """End all that runs in the pod's cgroup, at once."""
        cgroups.kill(self.cgroup)
        self.reap()

    def reap(self) -> None:
        """Wait for the :meth:`serve` processes, which have been killed."""
        for process in self._daemons:
            process.wait()
        self._daemons.clear()

    def delete(self) -> None:
        """What happens when a pod is deleted: not ready, processes end, CNI DEL, sandbox and manifest go."""
        if self.deleted:
            return
        self.deleted = True
        self.set_ready(False)
        self.kill_processes()
        self.node.runtime.delete(self._container, self._netns, self._args)
        self._remove_sandbox()
        self._cluster.remove("Pod", self.record.namespace, self.record.name)

    def _remove_sandbox(self) -> None:
        self.node.remove_netns(self._container)
        cgroups.remove(self.cgroup)
