"""A daemon of the cluster lab, as systemd would run it: a cgroup of its own, a log, found again by whoever looks.

Unlike :class:`lab.processes.Process` it belongs to nobody's process: another process may stop it and start it again, for
the cgroup alone says which processes are the service's.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from lab import cgroups
from lab.errors import LabError


class Service:
    """One daemon.

    :param command: ends up as the daemon by ``exec`` alone.
    :param cgroup: in the unified hierarchy, made at the start; holds this service and nothing else.
    :param entering: the front of a command line that enters the namespaces it lives in.
    :param everywhere: it joins the cgroup of this name in each other hierarchy too, as it would on a real machine.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        cgroup: Path,
        log: Path,
        entering: Sequence[str] = (),
        everywhere: bool = False,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.cgroup = cgroup
        self.log = log
        self._entering = list(entering)
        self._everywhere = everywhere

    @property
    def pids(self) -> list[int]:
        """Its own processes: containerd's shims live in its cgroup and go on when it ends (systemd's KillMode=process)."""
        return [pid for pid in cgroups.processes(self.cgroup) if not _is_shim(pid)]

    @property
    def running(self) -> bool:
        return bool(self.pids)

    def start(self) -> None:
        """:raises LabError: it runs already, or cannot be started."""
        if self.running:
            raise LabError(f"{self.name} runs already")
        groups = same_in_all(self.cgroup) if self._everywhere else [self.cgroup]
        joining: list[str] = []
        for group in groups:
            group.mkdir(parents=True, exist_ok=True)
            joining += cgroups.joining(group)
        # setsid --fork: its parent becomes init, so that whoever started it need not wait for it.
        command = [*joining, *self._entering, "/usr/bin/setsid", "--fork", *self.command]
        with open(self.log, "ab") as log:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", check=False
            )
        if done.returncode != 0:
            raise LabError(f"{self.name} does not start: {self.tail()}")

    def signal(self, number: int) -> None:
        for pid in self.pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self, timeout: float = 10.0) -> None:
        """SIGKILL to every process of it, and wait for their end.

        :raises LabError: some are still there after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while pids := self.pids:
            if time.monotonic() > deadline:
                raise LabError(f"processes {pids} of {self.name} do not end")
            self._end(signal.SIGKILL, deadline)

    def stop(self, timeout: float = 10.0) -> None:
        """SIGTERM; SIGKILL for what is still there after ``timeout`` seconds."""
        self._end(signal.SIGTERM, time.monotonic() + timeout)
        self.kill()

    def _end(self, number: int, deadline: float) -> None:
        """Signal its processes and wait until ``deadline`` for the end of each of their threads.

        ``cgroup.procs`` forgets a process whose threads still hold its files, the sockets it listens on among them: only
        a pidfd tells when it has let go of everything.
        """
        with contextlib.ExitStack() as opened:
            waiting = select.poll()
            ending = set()
            for pid in self.pids:
                try:
                    process = os.pidfd_open(pid)
                    opened.callback(os.close, process)
                    signal.pidfd_send_signal(process, number)
                except ProcessLookupError:
                    continue
                waiting.register(process, select.POLLIN)
                ending.add(process)
            while ending and (left := deadline - time.monotonic()) > 0:
                for process, _ in waiting.poll(left * 1000):
                    waiting.unregister(process)
                    ending.discard(process)

    def restart(self) -> None:
        self.stop()
        self.start()

    def tail(self, lines: int = 20) -> str:
        """The end of its log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""


def _is_shim(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("containerd-shim")
    except OSError:
        return False


def same_in_all(cgroup: Path) -> list[Path]:
    """The cgroup of this path below the root of every mounted hierarchy, the unified one among them."""
    below = cgroup.relative_to(cgroups.root())
    return [hierarchy / below for hierarchy in cgroups.hierarchies()]
