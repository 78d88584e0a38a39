"""What is done inside a pod's network namespace, each time in a thread of its own that is thrown away.

Owns the sockets that are made there and the way back for delivered connections: a delivery is bound to its client's address,
so the answers have to come back to it although that address is somebody else's. Its mark goes over the loopback interface
with the SYN, the server's socket takes it on (``tcp_fwmark_accept``), and a rule sends what bears it to a table in which every
address is local. No iptables, and nothing for packets without the mark.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from agent.kernel import netlink

T = TypeVar("T")

#: Set on delivery sockets (SO_MARK), and what the rule and the table go by.
DELIVERY_MARK = 0x6D79
DELIVERY_TABLE = 0x6D79
DELIVERY_PRIORITY = 101

_CLONE_NEWNET = 0x40000000
_SO_NETNS_COOKIE = 71
_IP_TRANSPARENT = 19
_IPV6_TRANSPARENT = 75
_IPV6_FREEBIND = 78
_BACKLOG = 4096

# The first is for both families. The others let a refusal (RST) of a closed port find its way back too.
_SYSCTLS = ("ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect")

_libc = ctypes.CDLL(None, use_errno=True)


def inside(netns: int, work: Callable[[], T]) -> T:
    """Run ``work`` in the namespace and give back its result; what it raises comes through.

    :raises OSError: the namespace cannot be entered.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if _libc.setns(netns, _CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                raise OSError(code, f"enter the pod's namespace: {os.strerror(code)}")
            results.append(work())
        except BaseException as error:  # handed to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="pod namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def addresses(netns: int | None) -> frozenset[str]:
    """Every address of the namespace, None being this one's, but loopback and link-local ones."""

    def work() -> frozenset[str]:
        found = {ipaddress.ip_address(address) for address, _ in netlink.addresses()}
        return frozenset(str(one) for one in found if not one.is_loopback and not one.is_link_local)

    return work() if netns is None else inside(netns, work)


def _cookie() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])


def cookie(netns: int) -> int:
    """The namespace's cookie: its key in every kernel table."""
    return inside(netns, _cookie)


def prepare(netns: int) -> None:
    """Make the way back."""

    def work() -> None:
        _set_sysctls("1")
        for family in _families():
            netlink.add_local_route(family, DELIVERY_TABLE)
            netlink.add_rule(family, DELIVERY_MARK, DELIVERY_TABLE, DELIVERY_PRIORITY)

    inside(netns, work)


def restore(netns: int) -> None:
    """Undo :func:`prepare`. The settings become what they are in a new namespace."""

    def work() -> None:
        for family in _families():
            netlink.remove_rule(family, DELIVERY_MARK, DELIVERY_TABLE, DELIVERY_PRIORITY)
            netlink.remove_local_route(family, DELIVERY_TABLE)
        _set_sysctls("0")

    inside(netns, work)


def _families() -> tuple[int, ...]:
    """Those that the namespace of this thread has: a kernel may be without IPv6, or a namespace have it switched off."""
    try:
        off = Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").read_text().strip() != "0"
    except FileNotFoundError:
        off = True
    return (socket.AF_INET,) if off else (socket.AF_INET, socket.AF_INET6)


def _settings() -> list[str]:
    """Below ``/proc/sys/net``."""
    return [name for name in _SYSCTLS if name.startswith("ipv4") or len(_families()) > 1]


def _set_sysctls(value: str) -> None:
    for name in _settings():
        try:
            Path("/proc/sys/net", name).write_text(value)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            # A container's /proc/sys is read-only, the node's is not; which namespace is meant is said by who opens it.
            Path("/proc/1/root/proc/sys/net", name).write_text(value)


def is_prepared(netns: int) -> bool:
    """Whether the way back is there."""
    return inside(netns, lambda: all(netlink.is_local_by_mark(f, DELIVERY_MARK) for f in _families()))


def lacks(netns: int) -> list[str]:
    """What of the way back is not there."""

    def work() -> list[str]:
        found = [
            f"net.{name.replace('/', '.')} is not 1"
            for name in _settings()
            if Path("/proc/sys/net", name).read_text().strip() != "1"
        ]
        for family in _families():
            if not netlink.is_local_by_mark(family, DELIVERY_MARK):
                version = 6 if family == socket.AF_INET6 else 4
                found.append(f"delivered IPv{version} connections have no way back (rule or route is gone)")
        return found

    return inside(netns, work)


def listener(netns: int, addresses: tuple[str, ...], port: int) -> socket.socket:
    """A listening socket in the namespace, for one address of a pod or for one of each family.

    Connections come to it by sk_lookup, whatever it is bound to: if the pod has the port itself, another one does. For both
    families it is an IPv6 socket that is bound to the IPv4 address: one that is bound to an IPv6 address takes no IPv4.
    """
    address = next((address for address in addresses if ":" not in address), addresses[0])
    if len(addresses) > 1:
        address = f"::ffff:{address}"

    def make() -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            # While the address is being probed for duplicates (RFC 4862, section 5.4) nobody may bind it otherwise.
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        return sock

    def work() -> socket.socket:
        sock = make()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # A proxy's successor gets its own while the old one drains.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            try:
                sock.bind((address, port))
                sock.listen(_BACKLOG)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                sock.close()
                sock = make()
                sock.bind((address, 0))
                sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock

    return inside(netns, work)


def dialling(netns: int, count: int, *, delivery: bool, ipv6: bool = False) -> list[int]:
    """Descriptors of unconnected, non-blocking TCP sockets without delay in the namespace.

    :param delivery: they may bind any address, and answers come back to them.
    """
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    transparent = (socket.IPPROTO_IPV6, _IPV6_TRANSPARENT) if ipv6 else (socket.SOL_IP, _IP_TRANSPARENT)

    def work() -> list[int]:
        made: list[socket.socket] = []
        try:
            for _ in range(count):
                sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                made.append(sock)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if delivery:
                    sock.setsockopt(*transparent, 1)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, DELIVERY_MARK)
        except BaseException:
            for sock in made:
                sock.close()
            raise
        return [sock.detach() for sock in made]

    return inside(netns, work)


def destroy(netns: int, local: tuple[str, int], remote: tuple[str, int], socket_cookie: int) -> bool:
    """Abort one connection of the namespace; False when it is gone."""
    return inside(netns, lambda: netlink.destroy_tcp(local, remote, socket_cookie))
