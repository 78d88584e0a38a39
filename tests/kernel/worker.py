"""A process in a pod: its own cgroup and network namespace, doing socket calls that a test asks for.

Standard library only, run by path. Requests and answers are JSON packets on the socket whose descriptor is the first argument;
sockets come back as descriptors, so that a test can use what was dialled or accepted elsewhere.
"""

import array
import ctypes
import json
import os
import socket
import sys

CLONE_NEWNET = 0x40000000


def enter(cgroup, netns):
    with open(os.path.join(cgroup, "cgroup.procs"), "w") as file:
        file.write(str(os.getpid()))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(netns, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def make(family, protocol, options):
    sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    for level, name, value in options:
        sock.setsockopt(level, name, value)
    return sock


def connect(address, family, protocol, bind, timeout, options, nonblocking):
    sock = make(family, protocol, options)
    try:
        if bind:
            sock.bind(tuple(bind))
        if nonblocking:
            sock.setblocking(False)
            code = sock.connect_ex(tuple(address))
            if code not in (0, 115):
                raise OSError(code, os.strerror(code))
            return sock
        sock.settimeout(timeout)
        sock.connect(tuple(address))
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def listen(address, family, protocol, options):
    sock = make(family, protocol, [[socket.SOL_SOCKET, socket.SO_REUSEADDR, 1], *options])
    try:
        sock.bind(tuple(address))
        sock.listen(128)
    except BaseException:
        sock.close()
        raise
    return sock


def datagrams(address, family, bind):
    """A UDP socket, connected when there is an address."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if bind:
            sock.bind(tuple(bind))
        if address:
            sock.connect(tuple(address))
    except BaseException:
        sock.close()
        raise
    return sock


def send(data, address, fds):
    """With a socket of :func:`datagrams`; without an address, to what it is connected to."""
    with socket.socket(fileno=fds[0]) as sock:
        if address:
            sock.sendto(data.encode(), tuple(address))
        else:
            sock.send(data.encode())


def reconnect(address, fds):
    with socket.socket(fileno=fds[0]) as sock:
        sock.connect(tuple(address))


def disconnect(fds):
    """connect() to AF_UNSPEC, which Python does not know."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(fds[0], bytes(16), 16) != 0:
        raise OSError(ctypes.get_errno(), "connect")
    os.close(fds[0])


def spread(address, count, family, connecting):
    """A datagram from each of so many sockets."""
    for _ in range(count):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            if connecting:
                sock.connect(tuple(address))
                sock.send(b"x")
            else:
                sock.sendto(b"x", tuple(address))


def dial_many(address, count):
    """Connect so many UDP sockets; to where each of them is connected, as the kernel has it."""
    found = []
    while count:
        socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(min(count, 500))]
        count -= len(socks)
        try:
            for sock in socks:
                sock.connect(tuple(address))
            with open("/proc/thread-self/net/udp") as lines:
                next(lines)
                for line in lines:
                    remote = line.split()[2].partition(":")[0]
                    if remote != "00000000":
                        found.append(socket.inet_ntoa(bytes.fromhex(remote)[::-1]))
        finally:
            for sock in socks:
                sock.close()
    return found


def crowd(addresses, count, family):
    """So many sockets, each of which sends to all of these."""
    for _ in range(count):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            for address in addresses:
                sock.sendto(b"x", tuple(address))


def dial_with(address, bind, timeout, fds):
    """Dial with a socket that was made elsewhere."""
    sock = socket.socket(fileno=fds[0])
    sock.settimeout(timeout)
    if bind:
        sock.bind(tuple(bind))
    sock.connect(tuple(address))
    sock.settimeout(None)
    return sock


def drop_capabilities():
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


def main():
    channel = socket.socket(fileno=int(sys.argv[1]))
    enter(sys.argv[2], int(sys.argv[3]))
    channel.send(b"{}")
    while True:
        data, ancillary, _, _ = channel.recvmsg(65536, socket.CMSG_SPACE(64))
        if not data:
            return
        fds = array.array("i")
        for _, _, raw in ancillary:
            fds.frombytes(raw)
        request = json.loads(data)
        arguments = request["arguments"]
        if fds:
            arguments["fds"] = list(fds)
        try:
            result = globals()[request["call"]](**arguments)
        except OSError as error:
            channel.send(
                json.dumps({"errno": error.errno, "timeout": isinstance(error, TimeoutError)}).encode()
            )
            continue
        if isinstance(result, socket.socket):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [result.fileno()]))]
            channel.sendmsg([b"{}"], rights)
            result.close()
        else:
            channel.send(json.dumps({"result": result}).encode())


main()
