"""A node for the kernel's own tests: a few namespaces on one bridge, cgroups, pins, and processes to dial from.

Smaller than the lab on purpose: no agent, no proxies, no CNI; only the facade and real sockets.
"""

from __future__ import annotations

import array
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Self

from agent.kernel import Kernel, Pod, namespace
from bpf import wire
from bpf.wire import Role
from tests.requirements import ROOT

CLONE_NEWNET = 0x40000000
_WORKER = Path(__file__).with_name("worker.py")
_numbers = itertools.count(16)

MPTCP = 262


def new_namespace() -> int:
    """A descriptor of a new network namespace; it lives as long as somebody uses it."""
    found: list[int] = []

    def work() -> None:
        if namespace._libc.unshare(CLONE_NEWNET) == 0:
            found.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def run(netns: int, *command: str) -> str:
    done = subprocess.run(
        ["nsenter", f"--net=/proc/self/fd/{netns}", "--", *command],
        pass_fds=(netns,),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


class Sock(socket.socket):
    """A socket that tells addresses as everybody else here: (canonical text, port)."""

    def getpeername(self) -> tuple[str, int]:
        return _end(super().getpeername())

    def getsockname(self) -> tuple[str, int]:
        return _end(super().getsockname())

    def accept(self) -> tuple[socket.socket, tuple[str, int]]:
        sock, peer = super().accept()
        return Sock(fileno=sock.detach()), _end(peer)

    def recvfrom(self, size: int, flags: int = 0) -> tuple[bytes, tuple[str, int]]:
        data, peer = super().recvfrom(size, flags)
        return data, _end(peer)

    def answer(self, data: bytes, peer: tuple[str, int]) -> None:
        """To whom :meth:`recvfrom` told."""
        mapped = self.family == socket.AF_INET6 and ":" not in peer[0]
        self.sendto(data, (f"::ffff:{peer[0]}", peer[1]) if mapped else peer)


def _end(name: tuple[Any, ...]) -> tuple[str, int]:
    return wire.canonical(name[0]), name[1]


class Worker:
    """A process in a cgroup and a namespace."""

    #: The family under test: of pods' addresses, and whether IPv4 is dialled as applications do that have IPv6 sockets only.
    ipv6: ClassVar[bool] = False
    mapped: ClassVar[bool] = False

    def _family(self, address: tuple[str, int], family: int | None) -> tuple[tuple[str, int], int]:
        if family is not None:
            return address, family
        if ":" in address[0] or (not address[0] and self.ipv6):
            return address, socket.AF_INET6
        if self.mapped and address[0]:
            return (f"::ffff:{address[0]}", address[1]), socket.AF_INET6
        return address, socket.AF_INET

    def __init__(self, cgroup: Path, netns: int) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(30)
        self.process = subprocess.Popen(
            ["/usr/bin/python3", "-SE", str(_WORKER), str(theirs.fileno()), str(cgroup), str(netns)],
            pass_fds=(theirs.fileno(), netns),
        )
        theirs.close()
        self._channel.recv(100)

    def _call(self, call: str, *, fds: tuple[int, ...] = (), **arguments: Any) -> Sock | None:
        data = json.dumps({"call": call, "arguments": arguments}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._channel.sendmsg([data], rights)
        answer, got, _, _ = socket.recv_fds(self._channel, 1 << 17, 1)
        error = json.loads(answer)
        self._result = error.get("result")
        if error.get("timeout"):
            raise TimeoutError
        if error.get("errno"):
            raise OSError(error["errno"], os.strerror(error["errno"]))
        return Sock(fileno=got[0]) if got else None

    def connect(
        self,
        address: tuple[str, int],
        *,
        family: int | None = None,
        protocol: int = 0,
        bind: tuple[str, int] | None = None,
        timeout: float = 3.0,
        options: tuple[tuple[int, int, int], ...] = (),
        nonblocking: bool = False,
    ) -> socket.socket:
        address, family = self._family(address, family)
        if bind is not None:
            bind, _ = self._family(bind, None)
        sock = self._call(
            "connect",
            address=address,
            family=family,
            protocol=protocol,
            bind=bind,
            timeout=timeout,
            options=options,
            nonblocking=nonblocking,
        )
        assert sock is not None
        sock.setblocking(not nonblocking)
        return sock

    def listen(
        self,
        address: tuple[str, int],
        *,
        family: int | None = None,
        protocol: int = 0,
        options: tuple[tuple[int, int, int], ...] = (),
    ) -> socket.socket:
        """:param address: with the empty text for any address of the family under test."""
        if family is None:
            family = (
                socket.AF_INET6 if ":" in address[0] or (not address[0] and self.ipv6) else socket.AF_INET
            )
        sock = self._call("listen", address=address, family=family, protocol=protocol, options=options)
        assert sock is not None
        sock.settimeout(5)
        return sock

    def datagrams(
        self, address: tuple[str, int] | None = None, *, bind: tuple[str, int] | None = None
    ) -> Sock:
        """A UDP socket of this process, connected when there is an address."""
        family: int = socket.AF_INET6 if self.ipv6 or self.mapped else socket.AF_INET
        if address is not None:
            address, family = self._family(address, None)
        sock = self._call("datagrams", address=address, family=family, bind=bind)
        assert sock is not None
        sock.settimeout(3)
        return sock

    def send(self, sock: socket.socket, data: str, address: tuple[str, int] | None = None) -> None:
        """What it sends itself, the kernel sees as sent by this process."""
        if address is not None:
            address, _ = self._family(address, None)
        self._call("send", data=data, address=address, fds=(sock.fileno(),))

    def disconnect(self, sock: socket.socket) -> None:
        self._call("disconnect", fds=(sock.fileno(),))

    def reconnect(self, sock: socket.socket, address: tuple[str, int]) -> None:
        self._call("reconnect", address=self._family(address, None)[0], fds=(sock.fileno(),))

    def spread(self, address: tuple[str, int], count: int, *, connecting: bool = False) -> None:
        """A datagram from each of so many sockets."""
        address, family = self._family(address, None)
        self._call("spread", address=address, count=count, family=family, connecting=connecting)

    def dial_many(self, address: tuple[str, int], count: int) -> list[str]:
        """Connect so many UDP sockets over IPv4; to where each of them is connected, as the kernel has it."""
        self._call("dial_many", address=address, count=count)
        assert isinstance(self._result, list)
        return self._result

    def crowd(self, addresses: Sequence[tuple[str, int]], count: int) -> None:
        """So many sockets, one after the other, each of which sends to all of these."""
        called = [self._family(address, None) for address in addresses]
        self._call("crowd", addresses=[address for address, _ in called], count=count, family=called[0][1])

    def dial_with(
        self, fd: int, address: tuple[str, int], bind: tuple[str, int] | None = None, timeout: float = 3.0
    ) -> socket.socket:
        """Dial with a socket that was made elsewhere; the descriptor is closed."""
        os.set_blocking(fd, True)
        try:
            sock = self._call("dial_with", address=address, bind=bind, timeout=timeout, fds=(fd,))
        finally:
            os.close(fd)
        assert sock is not None
        return sock

    def drop_capabilities(self) -> None:
        self._call("drop_capabilities")

    def close(self) -> None:
        self._channel.close()
        self.process.wait(10)


class TestPod:
    """A pod: a namespace with addresses on the bridge, and a process of the application.

    ``address`` is that of the family under test.
    """

    __test__ = False

    def __init__(self, node: Node, address: str, identity: int) -> None:
        self.node = node
        self.address4 = address
        third, fourth = address.split(".")[2:]
        self.address6 = wire.canonical(f"fd77::{int(third):x}:{int(fourth):x}")
        self.addresses = (self.address4, self.address6)
        self.address = self.address6 if Worker.ipv6 else self.address4
        self.identity = identity
        self.zone = 0
        self.netns = new_namespace()
        self.cookie = namespace.cookie(self.netns)
        self.interface = f"mk{next(_numbers)}"
        self._closing = ExitStack()
        self._closing.callback(self._close_netns)
        try:
            self._wire()
            self.app = self.worker("app")
        except BaseException:
            self._closing.close()
            raise
        # Also when its test fails before it closes it.
        node.closing.callback(self._closing.close)

    def _wire(self) -> None:
        fd = self.netns
        script = (
            f"ip link add {self.interface} type veth peer name eth0 netns /proc/self/fd/{fd}"
            f" && ip link set {self.interface} master br0 up"
            f" && nsenter --net=/proc/self/fd/{fd} sh -c 'echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad"
            f" && ip addr add {self.address4}/16 dev eth0"
            f" && ip addr add {self.address6}/64 dev eth0 nodad && ip link set eth0 up && ip link set lo up"
            f" && ip route add default via {self.node.gateway4}"
            f" && ip -6 route add default via {self.node.gateway6}'"
        )
        done = subprocess.run(
            ["nsenter", f"--net=/proc/self/fd/{self.node.netns}", "sh", "-c", script],
            pass_fds=(fd, self.node.netns),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr

    def worker(self, name: str) -> Worker:
        """A process in this pod's namespace, in the node's cgroup of that name."""
        worker = Worker(self.node.cgroup(name), self.netns)
        self._closing.callback(worker.close)
        return worker

    def enrol(self, table: Mapping[Any, bool] | None = None, generation: int = 1) -> Self:
        pod = Pod(self.cookie, self.addresses, self.identity, zone=self.zone)
        self.node.kernel.add_pod(pod, self.netns)
        if table is not None:
            self.node.kernel.set_policy(self.cookie, table, generation)
        return self

    def _close_netns(self) -> None:
        if self.netns >= 0:
            os.close(self.netns)
            self.netns = -1

    def close(self) -> None:
        """The pod is gone, from the machine and from the kernel's tables."""
        self.node.kernel.remove_pod(self.cookie)
        self._closing.close()


class Node:
    """See the module."""

    gateway4 = "10.77.0.1"
    gateway6 = "fd77::1"

    @property
    def gateway(self) -> str:
        """The node's own address, of the family under test."""
        return self.gateway6 if Worker.ipv6 else self.gateway4

    def __init__(self, folder: Path, sizes: tuple[str, ...] = ()) -> None:
        self.closing = ExitStack()
        self._sizes = sizes
        self._cgroups: dict[str, Path] = {}
        try:
            self._build(folder)
        except BaseException:
            self.closing.close()
            raise

    def _build(self, folder: Path) -> None:
        from lab import cgroups

        libc = namespace._libc
        self.pins = folder / "bpf" / "mycel"
        mount = folder / "bpf"
        mount.mkdir()
        assert libc.mount(b"bpf", str(mount).encode(), b"bpf", 0, None) == 0
        self.closing.callback(libc.umount2, str(mount).encode(), 2)
        self.root = cgroups.root() / f"mycel-kernel-{os.getpid()}-{next(_numbers)}"
        self.root.mkdir()
        self.closing.callback(cgroups.remove, self.root)
        # The sockets that the facade makes belong to the cgroup of this process.
        own = Path("/proc/self/cgroup").read_text().splitlines()[-1].removeprefix("0::")
        home = cgroups.root() / own.strip().lstrip("/")
        (self.cgroup("agent") / "cgroup.procs").write_text(str(os.getpid()))
        self.closing.callback(lambda: (home / "cgroup.procs").write_text(str(os.getpid())))
        self.netns = new_namespace()
        self.closing.callback(os.close, self.netns)
        run(
            self.netns,
            "sh",
            "-c",
            f"ip link add br0 type bridge && ip addr add {self.gateway4}/16 dev br0"
            f" && ip addr add {self.gateway6}/64 dev br0 nodad"
            " && ip link set br0 up && ip link set lo up && echo 1 >/proc/sys/net/ipv4/ip_forward",
        )
        self.load()
        self.kernel = Kernel(self.pins, self.netns)
        self.closing.callback(self.kernel.close)
        for name, role in (
            ("agent", Role.AGENT),
            ("nodeproxy", Role.NODEPROXY),
            ("l7proxy", Role.L7PROXY),
            ("prober", Role.PROBER),
            ("envoy", Role.ENVOY),
        ):
            self.kernel.set_role(self.cgroup(name).stat().st_ino, role)

    def load(self, *options: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "bpf.loader", "--pins", str(self.pins), "--cgroup", str(self.root)]
        command += options
        for size in self._sizes:
            command += ["--size", size]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def cgroup(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path

    def worker(self, name: str) -> Worker:
        """A process in the node's own namespace."""
        worker = Worker(self.cgroup(name), self.netns)
        self.closing.callback(worker.close)
        return worker

    def close(self) -> None:
        self.closing.close()
