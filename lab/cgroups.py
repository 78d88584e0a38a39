"""The lab's cgroups: a subtree of the unified hierarchy, wherever the machine has mounted it.

Every process that the lab starts lives in that subtree, so that one write ends all of them, also those that a test or a
daemon left behind.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path

from lab.errors import LabError


@functools.cache
def root() -> Path:
    """Where cgroup v2 is mounted (``/sys/fs/cgroup``, or ``/sys/fs/cgroup/unified`` beside cgroup v1)."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise LabError("no cgroup v2 hierarchy is mounted")


def hierarchies() -> list[Path]:
    """Every mounted cgroup hierarchy, v1 ones too: a container runtime makes its folders in all of them."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(fields[1]) for fields in mounts if fields[2] in ("cgroup", "cgroup2")]


def joining(cgroup: Path) -> list[str]:
    """The front of a command line that moves its process into the cgroup before it runs the rest."""
    return ["/bin/sh", "-c", f'echo $$ >"{cgroup}/cgroup.procs" && exec "$@"', "sh"]


def processes(cgroup: Path) -> list[int]:
    """The processes of the cgroup and of all below it."""
    found: list[int] = []
    for folder, _, _ in os.walk(cgroup):
        try:
            found += [int(line) for line in Path(folder, "cgroup.procs").read_text().split()]
        except FileNotFoundError:
            continue
    return found


def kill(cgroup: Path, timeout: float = 10.0) -> None:
    """End every process of the subtree at once and wait until they are gone.

    :raises LabError: some are still there after ``timeout`` seconds.
    """
    try:
        (cgroup / "cgroup.kill").write_text("1")
    except FileNotFoundError:
        return
    deadline = time.monotonic() + timeout
    while "populated 1" in _read(cgroup / "cgroup.events"):
        if time.monotonic() > deadline:
            raise LabError(f"processes {processes(cgroup)} of {cgroup} do not end")
        time.sleep(0.002)


def remove(cgroup: Path, timeout: float = 5.0) -> None:
    """Remove the subtree, whose processes are gone."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            for folder, _, _ in os.walk(cgroup, topdown=False):
                os.rmdir(folder)
            return
        except FileNotFoundError:
            continue  # another cleaner is at it too
        except OSError as error:
            # A process that has just ended may still count for a moment.
            if time.monotonic() > deadline:
                raise LabError(f"cannot remove {cgroup}: {error}") from error
            time.sleep(0.01)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
