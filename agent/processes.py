"""Who a process is, by what the kernel says of it: its cgroup (roles go by cgroup id) and its network namespace.

Owns reading /proc and the cgroup hierarchy. Process ids come from SO_PEERCRED, so they are of this PID namespace.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
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
        text = (proc / "self/mountinfo").read_text()
    except OSError as error:
        raise ProcessError(f"process {pid}: {error.strerror}") from None
    inside = next((line[3:] for line in lines if line.startswith("0::")), None)
    if inside is None:
        raise ProcessError(f"process {pid} is in no cgroup of the unified hierarchy")
    mounts = list(_cgroup2_mounts(text.splitlines()))
    if ".." in inside.split("/"):
        return _outside(pid, inside, [point for _, point in mounts])
    for root, point in mounts:
        if ".." not in root.split("/") and os.path.commonpath([root, inside]) == root:
            return cgroup(Path(point, os.path.relpath(inside, root)))
    raise ProcessError(f"process {pid}: cgroup {inside} is below no cgroup2 mount here")


def _cgroup2_mounts(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Root and mount point of each."""
    for line in lines:
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == "cgroup2":
            root, point = before.split(" ")[3:5]
            yield root, point


def _outside(pid: int | str, inside: str, points: list[str]) -> Cgroup:
    """The cgroup of a process outside of our cgroup namespace, as containers have one with cgroup v2.

    What the kernel says of it begins with "..", from our own cgroup up (cgroup_namespaces(7)), and followed it could end at
    another's. So only its end is a hint where to look, and the process has to be listed in what is found.
    """
    wanted = inside.rpartition("../")[2].split("/")
    for point in points:
        for folder, _, files in os.walk(point):
            if "cgroup.procs" not in files or folder.split("/")[-len(wanted) :] != wanted:
                continue
            try:
                listed = Path(folder, "cgroup.procs").read_text().split()
            except OSError:  # gone, or of threads only
                continue
            if str(pid) in listed:
                return cgroup(Path(folder))
    raise ProcessError(f"process {pid}: cgroup {inside} is outside of what is visible here")


def netns_inode_of(pid: int | str, proc: Path = Path("/proc")) -> int:
    """:raises ProcessError: the process is gone, or may not be looked at."""
    try:
        return (proc / str(pid) / "ns/net").stat().st_ino
    except OSError as error:
        raise ProcessError(f"process {pid}: {error.strerror}") from None


def started(pid: int | str, proc: Path = Path("/proc")) -> int:
    """When it started, in clock ticks since boot (proc_pid_stat(5), field 22).

    :raises ProcessError: it is gone.
    """
    try:
        return int((proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[19])
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
