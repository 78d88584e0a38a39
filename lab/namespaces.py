"""Network namespaces: work inside one from this process, and commands that enter them.

Owns the rule that namespace work runs in its own thread, which is thrown away: ``setns`` changes one thread only, and a
thread that could not get back must never be used again. Nothing here gives a namespace a name on the machine.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lab.errors import LabError

T = TypeVar("T")

CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def inside(namespace: Path | int, work: Callable[[], T]) -> T:
    """Run ``work`` in a thread of its own that has entered the network namespace, and give back its result.

    :param namespace: a path or descriptor of it. What ``work`` opens (sockets) stays in that namespace for good.
    :raises LabError: the namespace cannot be entered; whatever ``work`` raises comes through as it is.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            fd = namespace if isinstance(namespace, int) else os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _libc.setns(fd, CLONE_NEWNET) != 0:
                    number = ctypes.get_errno()
                    raise LabError(f"cannot enter namespace {namespace}: {os.strerror(number)}")
            finally:
                if not isinstance(namespace, int):
                    os.close(fd)
            results.append(work())
        except BaseException as error:  # handed to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def open_socket(
    namespace: Path | int,
    family: int = socket.AF_INET,
    kind: int = socket.SOCK_STREAM,
    protocol: int = 0,
) -> socket.socket:
    """A socket that lives in the namespace; this process may use it from anywhere."""
    return inside(namespace, lambda: socket.socket(family, kind, protocol))


def connect(namespace: Path | int, address: tuple[str, int], timeout: float = 5.0) -> socket.socket:
    """A TCP connection dialled in the namespace.

    The dial runs in the calling process' cgroup: for roles that follow from the cgroup use a process instead.
    """
    sock = open_socket(namespace)
    try:
        sock.settimeout(timeout)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def entering(*, net: Path | None = None, mount: Path | None = None) -> list[str]:
    """The front of a command line that enters the namespaces before it runs the rest."""
    command = ["/usr/bin/nsenter"]
    if net is not None:
        command.append(f"--net={net}")
    if mount is not None:
        command.append(f"--mount={mount}")
    return [*command, "--"]
