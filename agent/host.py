"""What the agent has to find out about the node that it runs on, also from inside of a container with the node's PIDs.

Owns the node's part of the unified cgroup hierarchy and which cgroup is kubelet's. A pod cannot pass for kubelet: what runs below
``kubepods`` never counts, nor what is not in the node's own network and user namespace, nor what is not root's.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from agent import processes, sandboxes

_CLONE_NEWCGROUP = 0x02000000
_KUBELET = "kubelet"

_libc = ctypes.CDLL(None, use_errno=True)


class HostError(Exception):
    """The node does not look like one; the message says what is missing."""


def join_cgroup_namespace(proc: Path = Path("/proc")) -> None:
    """See the cgroups of the node's processes by the names that the node has for them.

    Containers have a cgroup namespace of their own with cgroup v2. Only this thread and those that it starts from now on change.

    :raises HostError: the node's is not to be seen (CAP_SYS_PTRACE) or not to be entered (CAP_SYS_ADMIN).
    """
    try:
        fd = os.open(proc / "1/ns/cgroup", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"the node's cgroup namespace cannot be seen: {error.strerror} (hostPID, CAP_SYS_PTRACE)"
        ) from None
    try:
        if os.fstat(fd).st_ino == (proc / "self/ns/cgroup").stat().st_ino:
            return
        if _libc.setns(fd, _CLONE_NEWCGROUP) != 0:
            reason = os.strerror(ctypes.get_errno())
            raise HostError(f"the node's cgroup namespace cannot be entered: {reason} (CAP_SYS_ADMIN)")
    finally:
        os.close(fd)


def cgroup_root(proc: Path = Path("/proc")) -> Path:
    """Where the node's part of the unified hierarchy is mounted.

    That is ``/sys/fs/cgroup``, beside version 1 ``/sys/fs/cgroup/unified``, in a container wherever the node's folder is mounted.

    :raises HostError: it is mounted nowhere here.
    """
    found: list[tuple[int, int, str]] = []
    for line in (proc / "self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == "cgroup2":
            root, point = before.split(" ")[3:5]
            # The container's own part of it is mounted too; the node's begins above that.
            parts = [part for part in root.split("/") if part]
            found.append((-parts.count(".."), len(parts), point))
    if not found:
        raise HostError("no cgroup v2 hierarchy is mounted (mount the node's /sys/fs/cgroup)")
    return Path(min(found)[2])


def find_kubelet(root: Path, proc: Path = Path("/proc")) -> tuple[int, processes.Cgroup] | None:
    """Process and cgroup of the node's kubelet; None when it does not run.

    :param root: the node's part of the unified hierarchy.
    :raises HostError: it runs, and its cgroup can have no role.
    """
    own = _namespaces_of("self", proc)
    for entry in os.listdir(proc):
        if not entry.isdigit():
            continue
        try:
            if (proc / entry / "comm").read_text().strip() != _KUBELET:
                continue
            status = (proc / entry / "status").read_text()
            uids = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]
            lines = (proc / entry / "cgroup").read_text().splitlines()
            if set(uids) != {"0"} or _namespaces_of(entry, proc) != own or _is_of_a_pod(lines):
                continue
        except (OSError, StopIteration):
            continue  # it has ended meanwhile, or is no kubelet of ours
        try:
            cgroup = processes.cgroup_of(entry, proc)
        except processes.ProcessError as error:
            raise HostError(f"kubelet's cgroup: {error}") from None
        if cgroup.id == root.stat().st_ino or not cgroup.path.is_relative_to(root):
            raise HostError(
                f"kubelet runs in cgroup {cgroup.path}, which is not its own: its probes cannot be told from others"
            )
        return int(entry), cgroup
    return None


def _is_of_a_pod(lines: list[str]) -> bool:
    return any(
        sandboxes.pod_uid(line) or part.startswith("kubepods")
        for line in lines
        for part in line.rpartition(":")[2].split("/")
    )


def _namespaces_of(pid: str, proc: Path) -> tuple[int, int]:
    """:raises OSError: the process has ended, or may not be looked at."""
    folder = proc / pid / "ns"
    return (folder / "net").stat().st_ino, (folder / "user").stat().st_ino
