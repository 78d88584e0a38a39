"""Network namespaces in the place of pods, and what the mesh says of them."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

from controlplane.api import MeshConfig, Resource, Update, Workload, encode

PREFIX = "mk-agent"
_numbers = itertools.count(1)
_links = itertools.count(1)


class Netns:
    """One namespace with interface ``eth0``; a context manager that removes it."""

    def __init__(self, *interfaces: str, wired: bool = False) -> None:
        """:param wired: the other ends of its interfaces are in this namespace, as a pod's are in its node's."""
        self.name = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self.path = Path("/run/netns", self.name)
        self._interfaces = interfaces or ("eth0",)
        self._wired = wired

    def __enter__(self) -> Netns:
        ip("netns", "add", self.name)
        lines = ["link set lo up"]
        for number, interface in enumerate(self._interfaces):
            if self._wired:
                # It goes with the pod's end.
                ours = f"mka{os.getpid()}-{next(_links)}"
                ip("link", "add", ours, "up", "type", "veth", "peer", "name", interface, "netns", self.name)
            else:
                lines.append(f"link add {interface} type veth peer name peer{number}")
                lines.append(f"link set peer{number} up")
            lines.append(f"link set {interface} up")
        ip("-n", self.name, "-batch", "-", input="\n".join(lines) + "\n")
        return self

    def add_address(self, address: str, interface: str = "eth0") -> None:
        ip("-n", self.name, "addr", "add", address, "dev", interface)

    def remove(self) -> None:
        if self.path.exists():
            ip("netns", "del", self.name)

    def __exit__(self, *_: object) -> None:
        self.remove()


def ip(*arguments: str, input: str = "") -> str:
    """:raises CalledProcessError: with ip's own words on standard error."""
    done = subprocess.run(["ip", *arguments], check=True, input=input, stdout=subprocess.PIPE, text=True)
    return done.stdout


def workload(name: str, *, node: str = "n1", enrolled: bool = True, **more) -> Workload:
    """A pod in the namespace ``default``; its UID follows from its name."""
    account = more.pop("service_account", name)
    return Workload(
        uid=more.pop("uid", f"uid-{name}"),
        namespace="default",
        name=name,
        service_account=account,
        node=node,
        identity=f"spiffe://cluster.local/ns/default/sa/{account}",
        enrolled=enrolled,
        ready=True,
        workload_name=more.pop("workload_name", name),
        **more,
    )


def complete(*resources: Resource, version: str = "v1", nonce: int = 1) -> Update:
    return Update(nonce=nonce, version=version, complete=True, upserts=(MeshConfig(), *resources))


def last_good(*resources: Resource) -> bytes:
    """The content of an agent's state file."""
    return encode(complete(*resources))
