"""Who a process is, by what the kernel says of it: its cgroup (roles go by cgroup id) and its network namespace.

Owns reading /proc and the cgroup hierarchy. Process ids come from SO_PEERCRED, so they are of this PID namespace.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class ProcessError(Exception):
    """The process is gone, or not visible from here."""


class Cgroup(NamedTuple):
    """A cgroup of the unified hierarchy. ``id`` is what bpf_get_current_cgroup_id() says of its processes."""

    path: Path
    id: int


def cgroup(path: Path) -> Cgroup:
    """:raises ProcessError: no folder of a cgroup hierarchy is there."""
    try:
        # kernfs: on 64-bit machines the inode number is the cgroup's id.
        return Cgroup(path, path.stat().st_ino)
    except OSError as error:
        raise ProcessError(f"cgroup {path}: {error.strerror}") from None


def cgroup_of(pid: int | str, proc: Path = Path("/proc")) -> Cgroup:
    """The cgroup of a process (``self`` for this one).

    :raises ProcessError: it is gone, or its cgroup is not below a mount of the hierarchy that is visible here.
    """
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
        mounts = (proc / "self/mountinfo").read_text().splitlines()
    except OSError as error:
        raise ProcessError(f"process {pid}: {error.strerror}") from None
    inside = next((line[3:] for line in lines if line.startswith("0::")), None)
    if inside is None:
        raise ProcessError(f"process {pid} is in no cgroup of the unified hierarchy")
    if ".." in inside.split("/"):
        # /proc/PID/cgroup, cgroup_namespaces(7): outside of our root. Followed, the path could end at another's cgroup.
        raise ProcessError(f"process {pid}: cgroup {inside} is outside of what is visible here")
    for line in mounts:
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] != "cgroup2":
            continue
        root, mount_point = before.split(" ")[3:5]
        if os.path.commonpath([root, inside]) == root:
            return cgroup(Path(mount_point, os.path.relpath(inside, root)))
    raise ProcessError(f"process {pid}: cgroup {inside} is below no cgroup2 mount here")


def netns_inode_of(pid: int | str, proc: Path = Path("/proc")) -> int:
    """:raises ProcessError: the process is gone, or may not be looked at."""
    try:
        return (proc / str(pid) / "ns/net").stat().st_ino
    except OSError as error:
        raise ProcessError(f"process {pid}: {error.strerror}") from None


def boot_id(proc: Path = Path("/proc")) -> str:
    """A name of this boot of the machine."""
    return (proc / "sys/kernel/random/boot_id").read_text().strip()


def find_netns(inode: int, proc: Path = Path("/proc")) -> int | None:
    """A descriptor of the network namespace with that inode, by any process in it; None if there is none."""
    for entry in os.listdir(proc):
        if not entry.isdigit():
            continue
        path = proc / entry / "ns/net"
        try:
            if path.stat().st_ino != inode:
                continue
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        if os.fstat(fd).st_ino == inode:
            return fd
        os.close(fd)
    return None
