"""Finds the network namespace of a pod that runs already, from the cgroup of its processes.

Owns how kubelet and runtimes name a pod's cgroup, and which of the namespaces that its processes are in is the pod's. The
cgroup is the kernel's word: a process cannot put itself into another pod's.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from agent.kernel import namespace

#: A pod's own folder: ``pod<UID>`` (driver cgroupfs) or ``kubepods-burstable-pod<UID with underscores>.slice`` (systemd).
#: A static pod's is named by the digest of its manifest, 32 digits without hyphens, which the API server does not know.
_POD = re.compile(
    r"(?:pod(?P<plain>[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{32})"
    r"|kubepods(?:-[a-z]+)*-pod(?P<slice>[0-9a-f]{8}_[0-9a-f_]{27}|[0-9a-f]{32})\.slice)"
)
_STATIC = re.compile(r"[0-9a-f]{32}")


class Sandbox(NamedTuple):
    """A pod's namespace, by a process in it: ``fd`` is the caller's, ``pid`` the oldest process found there."""

    fd: int
    inode: int
    cookie: int
    pid: int
    interfaces: tuple[str, ...]


def pod_uid(cgroup: str) -> str:
    """The UID of the pod that a process belongs to, by one line of its ``/proc/PID/cgroup``; empty for others.

    The outermost folder counts: what a container makes below its own is no pod's.
    """
    for part in cgroup.rpartition(":")[2].split("/"):
        if match := _POD.fullmatch(part):
            return match["plain"] or match["slice"].replace("_", "-")
    return ""


def processes_of_pods(proc: Path = Path("/proc")) -> Iterator[tuple[int, str]]:
    """(pid, UID) of every process of a pod."""
    for entry in os.listdir(proc):
        if not entry.isdigit():
            continue
        try:
            lines = (proc / entry / "cgroup").read_text().splitlines()
        except OSError:
            continue
        # The hierarchies of version 1 have the same folders; containers of a hybrid node may be in those only.
        uid = next((uid for line in lines if (uid := pod_uid(line))), "")
        if uid:
            yield int(entry), uid


def find(
    wanted: Collection[tuple[str, tuple[str, ...]]], *, not_in: Collection[int], proc: Path = Path("/proc")
) -> dict[str, Sandbox]:
    """The namespaces of running pods, by UID.

    :param wanted: (UID, addresses) of each. All have to be the namespace's own: a container may make namespaces of its own,
        which have the pod's cgroup too.
    :param not_in: inodes of namespaces that are no pod's, such as the node's.

    A static pod is wanted by the UID of its mirror and runs under another: it is the one whose namespace has the addresses, where
    no process has the UID.
    """
    addresses = dict(wanted)
    candidates: dict[str, list[tuple[int, int]]] = {}
    for pid, uid in processes_of_pods(proc):
        if uid in addresses or _STATIC.fullmatch(uid):
            try:
                candidates.setdefault(uid, []).append((_started(pid, proc), pid))
            except (OSError, ValueError, IndexError):
                continue
    found: dict[str, Sandbox] = {}
    of_static = [one for uid, pids in candidates.items() if uid not in addresses for one in pids]
    for uid in addresses:
        seen: set[int] = set(not_in)
        # The sandbox's own process is the oldest.
        for _, pid in sorted(candidates.get(uid, of_static)):
            sandbox = _look(pid, addresses[uid], seen, proc)
            if sandbox is not None:
                found[uid] = sandbox
                break
    return found


def _look(pid: int, addresses: tuple[str, ...], seen: set[int], proc: Path) -> Sandbox | None:
    try:
        fd = os.open(proc / str(pid) / "ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        inode = os.fstat(fd).st_ino
        if inode not in seen:
            seen.add(inode)

            def work() -> tuple[str, ...] | None:
                return (
                    tuple(name for _, name in socket.if_nameindex())
                    if all(map(_is_local, addresses))
                    else None
                )

            interfaces = namespace.inside(fd, work)
            if interfaces is not None:
                return Sandbox(os.dup(fd), inode, namespace.cookie(fd), pid, interfaces)
    except OSError:
        return None
    finally:
        os.close(fd)
    return None


def _started(pid: int, proc: Path) -> int:
    """In clock ticks since boot: proc_pid_stat(5), field 22."""
    return int((proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[19])


def _is_local(address: str) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((address, 0))
        except OSError:
            return False
        return True
