"""A machine of the lab: a process that holds a network and a mount namespace, and the folders that a real node has.

Everything of a node lives in these two namespaces (``/run``, ``/run/netns``, ``/sys/fs/bpf``, ``/var/lib``,
``/etc/cni/net.d``), so it goes with the node's processes: there is nothing to unmount and no pin to remove.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cni.install import install as install_plugin
from lab import cgroups, reach
from lab.errors import LabError
from lab.place import Place
from lab.runtime import Runtime

#: Debian's containernetworking-plugins.
CNI_PLUGINS = Path("/usr/lib/cni")
PLUGIN = "mycel"
RUN = Path("/run/mycel")

#: What a namespace's first process does before it says that it is ready, and sleeps until it is killed.
_NODE_INIT = """
mount -t tmpfs -o mode=755 lab /run
mkdir -p /run/netns /run/mycel
mount -t bpf bpf /sys/fs/bpf
mount -t tmpfs -o mode=755 lab /var/lib
mkdir -p /var/lib/mycel /var/lib/cni
mount -t tmpfs -o mode=755 lab /etc/cni/net.d
"""
_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    # Nobody has an address twice here, and looking for it takes a second.
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    # Where the bridge filter happens to be loaded it would cost every row of the benchmark, for no rule at all.
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
    "net/bridge/bridge-nf-call-arptables": "0",
}


def hold(name: str, cgroup: Path, script: str = "") -> tuple[Place, subprocess.Popen[str]]:
    """Start a process that holds namespaces of its own: network always, mounts if it has a script that mounts.

    :raises LabError: it did not come up; its errors are in the message.
    """
    cgroup.mkdir(parents=True, exist_ok=True)
    sysctls = "\n".join(
        f"[ ! -e /proc/sys/{key} ] || echo {value} >/proc/sys/{key}" for key, value in _SYSCTLS.items()
    )
    body = f"set -e\n{script}\n{sysctls}\nip link set lo up\necho ready\nexec sleep infinity >/dev/null 2>&1"
    kinds = ["--net", *(["--mount", "--propagation=private"] if script else [])]
    holder = subprocess.Popen(
        [*cgroups.joining(cgroup), "/usr/bin/unshare", *kinds, "--", "/bin/sh", "-c", body],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert holder.stdout is not None
    with holder.stdout:
        line = holder.stdout.readline()
        if line.strip() != "ready":
            raise LabError(f"{name} did not come up: {line}{holder.stdout.read()}")
    process = Path(f"/proc/{holder.pid}")
    place = Place(name, net=process / "ns/net", cgroup=cgroup, mount=process / "ns/mnt" if script else None)
    return place, holder


class Node(Place):
    """One node. ``number`` gives it its fabric address and its pods' subnet.

    :param folder: the node's folder in the lab's, for logs, plugins and credentials.
    :param mesh: chain our plugin after Debian's.
    :param ipv6: its pods have IPv6 addresses too.
    """

    def __init__(self, number: int, *, cgroup: Path, folder: Path, mesh: bool, ipv6: bool = False) -> None:
        name = f"node{number}"
        folder.mkdir(parents=True)
        self.number = number
        self.folder = folder
        self.mesh = mesh
        self.top = cgroup
        self.address_on_fabric = f"10.99.0.{10 + number}"
        self.subnet = f"10.244.{number}.0/24"
        self.subnet6 = f"fd44:0:0:{number}::/64"
        self.ipv6 = ipv6
        for part in (
            "kubepods",
            "runtime",
            "kubelet",
            "envoy",
            "mycel/agent",
            "mycel/nodeproxy",
        ):
            (cgroup / part).mkdir(parents=True)
        held, self.holder = hold(name, cgroup / "machine", f"{_NODE_INIT}{reach.script(reach.needed())}\n")
        super().__init__(name, net=held.net, cgroup=held.cgroup, mount=held.mount)
        assert held.mount is not None
        #: The node's file system as this process sees it.
        self.root = held.mount.parent.parent / "root"
        self.cni_binaries = self._install_plugins()
        self.configure_network()
        self.runtime = Runtime(
            root=self.root,
            net=held.net,
            mount=held.mount,
            binaries=self.cni_binaries,
            cgroup=cgroup / "runtime",
        )

    @property
    def kubelet(self) -> Path:
        """The cgroup whose processes' dials are probes."""
        return self.top / "kubelet"

    def configure_network(self, **settings: Any) -> None:
        """Write the node's list of CNI plugins; ``settings`` are more keys of our plugin's."""
        text = json.dumps(self._conflist(settings), indent=1)
        (self.root / f"etc/cni/net.d/10-{PLUGIN}.conflist").write_text(text)

    def _install_plugins(self) -> Path:
        folder = self.folder / "cni-bin"
        folder.mkdir()
        for name in ("bridge", "host-local", "loopback", "portmap"):
            if not (CNI_PLUGINS / name).exists():
                raise LabError(
                    f"{CNI_PLUGINS / name} is missing (Debian package containernetworking-plugins)"
                )
            (folder / name).symlink_to(CNI_PLUGINS / name)
        install_plugin(folder, name=PLUGIN)
        return folder

    def _conflist(self, settings: dict[str, Any]) -> dict[str, Any]:
        subnets = [self.subnet, self.subnet6] if self.ipv6 else [self.subnet]
        defaults = ["0.0.0.0/0", "::/0"] if self.ipv6 else ["0.0.0.0/0"]
        plugins: list[dict[str, Any]] = [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": True,
                "ipMasq": False,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": subnet}] for subnet in subnets],
                    "routes": [{"dst": destination} for destination in defaults],
                },
            }
        ]
        if self.mesh:
            plugins.append({"type": PLUGIN, "runDir": str(RUN), "pinDir": "/sys/fs/bpf/mycel", **settings})
        return {"cniVersion": "1.0.0", "name": "pods", "plugins": plugins}

    def add_netns(self, name: str) -> Path:
        """A new network namespace, bound in the node's ``/run/netns``; its path as seen from here."""
        target = f"/run/netns/{name}"
        inside = "echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad; exec ip link set lo up"
        self.run(["/bin/sh", "-ec", f"touch {target}; exec unshare --net={target} /bin/sh -ec '{inside}'"])
        return self.root / target.removeprefix("/")

    def remove_netns(self, name: str) -> None:
        self.run(["/bin/sh", "-c", f"umount -l /run/netns/{name}; rm -f /run/netns/{name}"])


def python_module(module: str) -> list[str]:
    """The command line of one of our processes, by the interpreter that runs this."""
    return [sys.executable, "-m", module]
