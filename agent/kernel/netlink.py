"""The few netlink messages that pods' namespaces need: a rule, a route, a look at it, the end of a socket.

Owns their bytes (rtnetlink(7), sock_diag(7)). A whole netlink library would cost the agent more memory than everything
else here. All functions act in the network namespace of the calling thread.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

_NETLINK_ROUTE = 0
_NETLINK_SOCK_DIAG = 4
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
_NLM_F_ACK = 4
_NLM_F_REPLACE = 0x100
_NLM_F_EXCL = 0x200
_NLM_F_CREATE = 0x400
_HEADER = struct.Struct("=IHHII")

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
