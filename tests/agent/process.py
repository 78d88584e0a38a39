"""The agent as a process, on folders of a test's own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from agent.state import MESH_FILE
from controlplane.api import Resource
from tests.agent.pods import PREFIX, last_good
from tests.requirements import ROOT

REAL = "agent"
FAKE_KERNEL = "tests.agent.fakes"

CGROUPS = next(
    (p for p in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")) if (p / "cgroup.procs").exists()),
    None,
)


class AgentProcess:
    """``python -m agent``; a context manager that ends it and removes what it pinned.

    With ``resources`` it begins with that as its last good state, so no controller is needed.
    """

    def __init__(
        self, folder: Path, *resources: Resource, module: str = REAL, controller: str = "127.0.0.1:1"
    ) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.state = folder / "state"
        self.module = module
        self.log = folder / "agent.log"
        self.controller = controller
        self.roots = folder / "roots.pem"
        self.credential = folder / "credential"
        name = f"{PREFIX}-{os.getpid()}-{folder.name}"
        self.bpf = folder / "bpf"
        self.pins = self.bpf / "mycel"
        assert CGROUPS is not None
        self.cgroup = CGROUPS / name
        self._popen: subprocess.Popen[bytes] | None = None
        for made in (self.run, self.state, self.bpf):
            made.mkdir()
        self.credential.write_text("token\n")
        if resources:
            (self.state / MESH_FILE).write_bytes(last_good(*resources))

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    def start(self, *, wait: bool = True) -> AgentProcess:
        (self.cgroup / "agent").mkdir(parents=True, exist_ok=True)
        if self.module == REAL and not os.path.ismount(self.bpf):
            subprocess.run(["mount", "-t", "bpf", "bpf", str(self.bpf)], check=True)
        own = self.cgroup / "agent/cgroup.procs"
        command = [
            *("/bin/sh", "-c", 'echo $$ >"$0"; exec "$@"', str(own)),
            *(
                sys.executable,
                "-m",
                self.module,
                "--node",
                "n1",
                "--run",
                str(self.run),
                "--state",
                str(self.state),
            ),
            *("--pins", str(self.pins), "--cgroup", str(self.cgroup), "--controller", self.controller),
            *("--roots", str(self.roots), "--credential", str(self.credential), "--admin", "127.0.0.1:0"),
            *("--log-level", "debug"),
        ]
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._popen = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self, timeout: float = 30.0) -> None:
        deadline = time.monotonic() + timeout
        while not connects(self.run / "agent.sock"):
            assert self._popen is not None
            assert self._popen.poll() is None, f"the agent ended:\n{self.tail()}"
            assert time.monotonic() < deadline, f"the agent did not come up:\n{self.tail()}"
            time.sleep(0.02)

    @property
    def admin_port(self) -> int:
        """Of the process that was started last; it may accept on its sockets before it has said which."""
        deadline = time.monotonic() + 10.0
        while not (found := re.search(rb"admin_port=(\d+)", self.log.read_bytes()[self._log_start :])):
            assert time.monotonic() < deadline, f"no admin port in the log:\n{self.tail()}"
            time.sleep(0.02)
        return int(found[1])

    def wait_for(self, text: str, timeout: float = 10.0) -> None:
        """Wait until it stands in the log."""
        deadline = time.monotonic() + timeout
        while text not in self.tail(1 << 20):
            assert time.monotonic() < deadline, f"no {text!r} in the log:\n{self.tail()}"
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for its end; the exit status."""
        if self._popen is None:
            return 0
        if self._popen.poll() is None:
            self._popen.send_signal(number)
        try:
            return self._popen.wait(30)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait(10)
            raise AssertionError(f"the agent did not end:\n{self.tail()}") from None

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def tail(self, size: int = 6000) -> str:
        return self.log.read_text()[-size:] if self.log.exists() else ""

    def __enter__(self) -> AgentProcess:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.clean_up()

    def clean_up(self) -> None:
        self.kill()
        if os.path.ismount(self.bpf):
            subprocess.run(["umount", str(self.bpf)], check=True)
        for folder, _subfolders, _files in os.walk(self.cgroup, topdown=False):
            deadline = time.monotonic() + 2
            while Path(folder).exists() and time.monotonic() < deadline:
                try:
                    os.rmdir(folder)
                except OSError:
                    time.sleep(0.02)


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return False
        return True
