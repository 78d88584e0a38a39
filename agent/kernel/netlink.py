"""The few netlink messages that pods' namespaces need: a rule, a route, a look at it, the end of a socket.

Owns their bytes (rtnetlink(7), sock_diag(7)). A whole netlink library would cost the agent more memory than everything
else here. All functions act in the network namespace of the calling thread.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

_NETLINK_ROUTE = 0
_NETLINK_SOCK_DIAG = 4
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
_NLM_F_ACK = 4
_NLM_F_REPLACE = 0x100
_NLM_F_EXCL = 0x200
_NLM_F_CREATE = 0x400
_HEADER = struct.Struct("=IHHII")

_NLMSG_DONE = 3
_NLM_F_ROOT = 0x100
_NLM_F_MATCH = 0x200
_NLA_TYPE_MASK = 0x3FFF
_RTM_GETLINK = 18
_RTM_GETADDR = 22
_RTM_GETNSID = 90
_IFLA_ADDRESS = 1
_IFLA_LINK = 5
_IFLA_LINK_NETNSID = 37
_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_NETNSA_NSID = 1
_NETNSA_FD = 3
_RTM_NEWROUTE = 24
_RTM_DELROUTE = 25
_RTM_GETROUTE = 26
_RTM_NEWRULE = 32
_RTM_DELRULE = 33
_FRA_PRIORITY = 6
_FRA_FWMARK = 10
_FRA_TABLE = 15
_FRA_FWMASK = 16
_FR_ACT_TO_TBL = 1
_RTA_DST = 1
_RTA_OIF = 4
_RTA_TABLE = 15
_RTA_MARK = 16
_RTN_LOCAL = 2
_RTPROT_STATIC = 4
_RT_SCOPE_HOST = 254
_IFINDEX_LOOPBACK = 1

_SOCK_DESTROY = 21


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _u32(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _request(protocol: int, kind: int, flags: int, body: bytes) -> bytes:
    """The answer's first message without its header; empty when it is a bare acknowledgement.

    :raises OSError: the kernel's error.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as sock:
        sock.settimeout(5.0)
        sock.send(_HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, 1, 0) + body)
        answer = sock.recv(65536)
    length, answered, _, _, _ = _HEADER.unpack_from(answer)
    if answered == _NLMSG_ERROR:
        code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        if code:
            raise OSError(code, os.strerror(code))
        return b""
    return answer[_HEADER.size : length]


def add_rule(family: int, mark: int, table: int, priority: int) -> None:
    """``ip rule add fwmark MARK lookup TABLE priority PRIORITY``; no error when it is there."""
    body = _rule(family, mark, table, priority)
    try:
        _request(_NETLINK_ROUTE, _RTM_NEWRULE, _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL, body)
    except FileExistsError:
        pass


def remove_rule(family: int, mark: int, table: int, priority: int) -> None:
    """The opposite of :func:`add_rule`; no error when it is not there."""
    try:
        _request(_NETLINK_ROUTE, _RTM_DELRULE, _NLM_F_ACK, _rule(family, mark, table, priority))
    except FileNotFoundError:
        pass


def _rule(family: int, mark: int, table: int, priority: int) -> bytes:
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 0, 0, 0, _FR_ACT_TO_TBL, 0)
    body += _u32(_FRA_PRIORITY, priority) + _u32(_FRA_FWMARK, mark) + _u32(_FRA_FWMASK, 0xFFFFFFFF)
    return body + _u32(_FRA_TABLE, table)


def add_local_route(family: int, table: int) -> None:
    """``ip route replace local default dev lo table TABLE``."""
    flags = _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_REPLACE
    _request(_NETLINK_ROUTE, _RTM_NEWROUTE, flags, _local_route(family, table))


def remove_local_route(family: int, table: int) -> None:
    """The opposite of :func:`add_local_route`; no error when it is not there."""
    try:
        _request(_NETLINK_ROUTE, _RTM_DELROUTE, _NLM_F_ACK, _local_route(family, table))
    except ProcessLookupError:
        pass


def _local_route(family: int, table: int) -> bytes:
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 0, _RTPROT_STATIC, _RT_SCOPE_HOST, _RTN_LOCAL, 0)
    return body + _u32(_RTA_OIF, _IFINDEX_LOOPBACK) + _u32(_RTA_TABLE, table)


def dump(kind: int, body: bytes) -> Iterator[bytes]:
    """Every message of the answer to a dump, without its header.

    :raises OSError: the kernel's error.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE) as sock:
        sock.settimeout(5.0)
        sock.send(
            _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | _NLM_F_ROOT | _NLM_F_MATCH, 1, 0)
            + body
        )
        while True:
            data = sock.recv(1 << 20)
            while data:
                length, answered, _, _, _ = _HEADER.unpack_from(data)
                if answered == _NLMSG_DONE:
                    return
                if answered == _NLMSG_ERROR:
                    code = -struct.unpack_from("=i", data, _HEADER.size)[0]
                    raise OSError(code, os.strerror(code))
                yield data[_HEADER.size : length]
                data = data[(length + 3) & ~3 :]


def attributes(data: bytes) -> dict[int, bytes]:
    """Values by kind; of nested ones the bytes."""
    found: dict[int, bytes] = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        found[kind & _NLA_TYPE_MASK] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


def addresses() -> list[tuple[str, int]]:
    """Every address of the namespace, and the index of its interface."""
    found: list[tuple[str, int]] = []
    for message in dump(_RTM_GETADDR, struct.pack("=BBBBI", 0, 0, 0, 0, 0)):
        family, _, _, _, index = struct.unpack_from("=BBBBI", message)
        given = attributes(message[8:])
        # With a peer (point to point) the local one is the own.
        value = given.get(_IFA_LOCAL) or given.get(_IFA_ADDRESS)
        if value is not None and family in (socket.AF_INET, socket.AF_INET6):
            found.append((socket.inet_ntop(family, value), index))
    return found


class Veth(NamedTuple):
    """One interface, by its index. ``peer`` is its other end, in the namespace that ``peer_namespace`` numbers (-1: this)."""

    number: int
    mac: bytes
    peer: int
    peer_namespace: int


def link(index: int) -> Veth:
    """An interface of the namespace.

    :raises OSError: there is none of that index.
    """
    answer = _request(_NETLINK_ROUTE, _RTM_GETLINK, 0, struct.pack("=BBHiII", 0, 0, 0, index, 0, 0))
    given = attributes(answer[16:])
    peer = struct.unpack("=I", given[_IFLA_LINK])[0] if _IFLA_LINK in given else 0
    of = struct.unpack("=i", given[_IFLA_LINK_NETNSID])[0] if _IFLA_LINK_NETNSID in given else -1
    return Veth(index, given.get(_IFLA_ADDRESS, b""), peer, of)


def namespace_number(netns: int) -> int:
    """How this namespace numbers another one; -1 when it does not.

    :raises OSError: the kernel's error.
    """
    body = struct.pack("=BBBB", 0, 0, 0, 0) + _u32(_NETNSA_FD, netns)
    answer = _request(_NETLINK_ROUTE, _RTM_GETNSID, 0, body)
    number = attributes(answer[4:]).get(_NETNSA_NSID)
    return -1 if number is None else int(struct.unpack("=i", number)[0])


_RTM_NEWQDISC = 36
_RTM_GETQDISC = 38
_RTM_NEWTFILTER = 44
_RTM_DELTFILTER = 45
_RTM_GETTFILTER = 46
_TCA_KIND = 1
_TCA_OPTIONS = 2
_TCA_BPF_FD = 6
_TCA_BPF_NAME = 7
_TCA_BPF_FLAGS = 8
_BPF_DIRECT = 1
_CLSACT = 0xFFFFFFF1
_INGRESS = 0xFFFFFFF2
_EGRESS = 0xFFFFFFF3
#: Of our filters: before all that others are likely to choose.
_FILTER_PRIORITY = 1
_FILTER_HANDLE = 0x6D79
_ETH_P_ALL = socket.htons(3)


def _tc(index: int, handle: int, parent: int, info: int) -> bytes:
    return struct.pack("=BxHiIII", 0, 0, index, handle, parent, info)


def _filter(index: int, *, ingress: bool) -> bytes:
    info = _FILTER_PRIORITY << 16 | _ETH_P_ALL
    return _tc(index, _FILTER_HANDLE, _INGRESS if ingress else _EGRESS, info) + _attribute(
        _TCA_KIND, b"bpf\0"
    )


def _clsact(index: int) -> bytes:
    return _tc(index, _CLSACT & 0xFFFF0000, _CLSACT, 0) + _attribute(_TCA_KIND, b"clsact\0")


def _add_clsact(index: int) -> bool:
    """False where it, or another qdisc in its place, is there."""
    try:
        _request(_NETLINK_ROUTE, _RTM_NEWQDISC, _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL, _clsact(index))
    except FileExistsError:
        return False
    return True


def make_room_for_filters(index: int) -> bool:
    """A new clsact qdisc, or one in which no filter is; False where others have filters, or another qdisc in its place.

    :raises OSError: the kernel's error.
    """
    if _add_clsact(index):
        return True
    try:
        _request(_NETLINK_ROUTE, _RTM_GETQDISC, _NLM_F_ACK, _clsact(index))
    except OSError:
        return False
    ways = (_tc(index, 0, parent, 0) for parent in (_INGRESS, _EGRESS))
    return not any(True for way in ways for _ in dump(_RTM_GETTFILTER, way))


def add_filter(index: int, program: int, *, ingress: bool) -> None:
    """Run a program on an interface, as a filter that decides by itself; in place of our earlier one, at once.

    :raises OSError: the kernel's error.
    """
    _add_clsact(index)
    options = _u32(_TCA_BPF_FD, program) + _attribute(_TCA_BPF_NAME, b"mycel\0")
    body = _filter(index, ingress=ingress)
    body += _attribute(_TCA_OPTIONS, options + _u32(_TCA_BPF_FLAGS, _BPF_DIRECT))
    _request(_NETLINK_ROUTE, _RTM_NEWTFILTER, _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_REPLACE, body)


def remove_filter(index: int, *, ingress: bool) -> None:
    """The opposite of :func:`add_filter`; the qdisc stays, others may use it.

    :raises OSError: it is not there.
    """
    _request(_NETLINK_ROUTE, _RTM_DELTFILTER, _NLM_F_ACK, _filter(index, ingress=ingress))


def has_filter(index: int, *, ingress: bool) -> bool:
    """Whether ours is there."""
    try:
        _request(_NETLINK_ROUTE, _RTM_GETTFILTER, 0, _filter(index, ingress=ingress))
    except OSError:
        return False
    return True


def is_local_by_mark(family: int, mark: int) -> bool:
    """Whether packets with the mark come back to this namespace, whatever their destination."""
    # For documentation (RFC 5737 and 3849): nobody has them.
    nobody = socket.inet_pton(family, "192.0.2.1" if family == socket.AF_INET else "2001:db8::1")
    body = struct.pack("=BBBBBBBBI", family, len(nobody) * 8, 0, 0, 0, 0, 0, 0, 0)
    body += _attribute(_RTA_DST, nobody) + _u32(_RTA_MARK, mark)
    try:
        answer = _request(_NETLINK_ROUTE, _RTM_GETROUTE, 0, body)
    except OSError as error:
        if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL):
            return False
        raise
    return len(answer) > 8 and answer[7] == _RTN_LOCAL


def destroy_tcp(local: tuple[str, int], remote: tuple[str, int], cookie: int) -> bool:
    """Abort one TCP socket (``tcp_abort``: a reset goes to the peer); False when it is gone.

    IPv4 addresses find the socket of an IPv6 listener too.

    :param cookie: the socket's. Without one the kernel would take the listener when the connection is gone.
    """
    family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
    body = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
    body += struct.pack("!HH", local[1], remote[1])
    for address, _ in (local, remote):
        body += socket.inet_pton(family, address).ljust(16, b"\0")
    body += struct.pack("=III", 0, cookie & 0xFFFFFFFF, cookie >> 32)
    try:
        _request(_NETLINK_SOCK_DIAG, _SOCK_DESTROY, _NLM_F_ACK, body)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return False
        raise
    return True
