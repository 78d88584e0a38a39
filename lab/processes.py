"""Long-lived processes of the lab: started in a cgroup, logged to a file, ended by their own identifier."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lab.errors import LabError


class Process:
    """A daemon that can be killed and started again under the same name, with one log for all its lives."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        *,
        contained: bool = False,
    ):
        """:param contained: the command makes a PID namespace, and the daemon is its child, the first in it."""
        self.name = name
        self.command = list(command)
        self.log = log
        self.environment = dict(environment) if environment is not None else None
        self._contained = contained
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """:raises LabError: it does not run."""
        if self._popen is None or self._popen.poll() is not None:
            raise LabError(f"{self.name} does not run")
        if not self._contained:
            return self._popen.pid
        wait_until(self._children, 5.0, f"{self.name} is in its PID namespace")
        return self._children()[0]

    def _children(self) -> list[int]:
        assert self._popen is not None
        try:
            text = Path(f"/proc/{self._popen.pid}/task/{self._popen.pid}/children").read_text()
        except OSError:
            return []
        return [int(pid) for pid in text.split()]

    @property
    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    @property
    def exit_status(self) -> int | None:
        return None if self._popen is None else self._popen.poll()

    def start(self) -> None:
        """:raises LabError: it runs already."""
        if self.running:
            raise LabError(f"{self.name} runs already")
        # The commands in front (cgroup, namespaces, capabilities) all exec: the child's pid is the daemon's, but for a PID
        # namespace, whose maker waits and ends as the daemon ends.
        with open(self.log, "ab") as log:
            self._popen = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, cwd="/"
            )

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self._popen is not None and self._popen.poll() is None:
            # Of what is in a PID namespace the first takes all with it; its maker sees that.
            children = self._children() if self._contained else []
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            if not children:
                self._popen.kill()
        self._wait(5.0)

    def stop(self, timeout: float = 10.0) -> int:
        """SIGTERM, wait, and give back the exit status (negative: the signal that ended it).

        :raises LabError: it did not end in ``timeout`` seconds (it is killed then).
        """
        if self.running:
            self.signal(signal.SIGTERM)
        return self._wait(timeout)

    def _wait(self, timeout: float) -> int:
        if self._popen is None:
            return 0
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait(5.0)
            raise LabError(f"{self.name} did not end in {timeout} s") from None

    def tail(self, lines: int = 40) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""


def wait_until(
    condition: Callable[[], object],
    timeout: float,
    what: str,
    *,
    interval: float = 0.02,
    explain: Callable[[], object] | None = None,
) -> None:
    """Wait until ``condition()`` is true.

    :param explain: called for the message when time is up, to say what was seen instead.
    :raises LabError: after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            seen = f": {explain()}" if explain is not None else ""
            raise LabError(f"{what}: not within {timeout} s{seen}")
        time.sleep(interval)
