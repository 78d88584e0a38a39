"""Keeps the role of prober with kubelet's cgroup, so that its probes pass under STRICT, whenever it starts, ends or moves.

Owns the watch; what counts as kubelet is :mod:`agent.host`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from agent import host, processes
from agent.roles import RoleError, Roles
from bpf.wire import Role
from common import logs

_log = logs.get(__name__)

#: Seconds between looks while there is none, and at whether a running one is still where it was.
ABSENT = 0.5
PRESENT = 5.0


class Prober:
    """See the module."""

    def __init__(self, roles: Roles, root: Path) -> None:
        """``root`` is the node's part of the unified hierarchy."""
        self._roles = roles
        self._root = root
        self._cgroup: processes.Cgroup | None = None
        #: Why probes do not pass under STRICT; empty when they do.
        self.problem = "kubelet was not looked for yet"

    async def run(self) -> None:
        """Until cancelled. The role stays: an agent that ends is one that is replaced."""
        while True:
            pid = await self.look()
            if pid is None:
                await asyncio.sleep(ABSENT)
                continue
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                try:
                    while not await _ends_within(fd, PRESENT) and self._stays(pid):
                        pass
                finally:
                    os.close(fd)

    async def look(self) -> int | None:
        """Give kubelet's cgroup its role; kubelet's process id, or None when there is no kubelet that could have it."""
        try:
            found = await asyncio.to_thread(host.find_kubelet, self._root)
            if found is None:
                self._say("no kubelet runs on this node")
                self._move(None)
                return None
            self._move(found[1])
        except (host.HostError, RoleError) as error:
            self._say(str(error))
            return None
        self.problem = ""
        return found[0]

    def _stays(self, pid: int) -> bool:
        try:
            return processes.cgroup_of(pid) == self._cgroup
        except processes.ProcessError:
            return False

    def _move(self, cgroup: processes.Cgroup | None) -> None:
        """:raises RoleError: the kernel refuses, or the cgroup has another role."""
        self._roles.only(Role.PROBER, cgroup)
        if cgroup != self._cgroup and cgroup is not None:
            _log.info("probes are kubelet's", cgroup=str(cgroup.path))
        self._cgroup = cgroup

    def _say(self, problem: str) -> None:
        if problem != self.problem:
            _log.warning("kubelet's probes do not pass under STRICT", reason=problem)
        self.problem = problem


async def _ends_within(pidfd: int, timeout: float) -> bool:
    """Wait for a process to end, no longer than ``timeout`` seconds."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await ended.wait()
    finally:
        loop.remove_reader(pidfd)
    return ended.is_set()
