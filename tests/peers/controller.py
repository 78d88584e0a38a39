"""A controller that really runs, on this machine's loopback, for tests that need no lab."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TOKEN = "a-token"


@dataclass(frozen=True)
class Controller:
    """``folder`` holds ``config``, ``state`` (with ``roots.pem``) and ``credentials`` (of ``node1``)."""

    folder: Path
    port: int
    admin: str

    @property
    def config(self) -> Path:
        return self.folder / "config"

    @property
    def roots(self) -> Path:
        return self.folder / "state" / "roots.pem"

    @property
    def credential(self) -> Path:
        return self.folder / "credential"


@contextmanager
def running(folder: Path) -> Iterator[Controller]:
    """A controller over ``folder/config``, which may hold manifests already."""
    for name in ("config", "state", "credentials"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "state").chmod(0o700)
    (folder / "credential").write_text(TOKEN)
    (folder / "credentials" / "node1").write_text(hashlib.sha256(TOKEN.encode()).hexdigest())
    command = [sys.executable, "-m", "controlplane", "--log-format", "json"]
    for name in ("config", "state", "credentials"):
        command += [f"--{name}", str(folder / name)]
    command += ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--server-name", "127.0.0.1"]
    log = folder / "controller.log"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            port, admin = _ports(process, log)
            yield Controller(folder, port, f"127.0.0.1:{admin}")
        finally:
            process.terminate()
            process.wait(10)


def _ports(process: subprocess.Popen[bytes], log: Path) -> tuple[int, int]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        for line in log.read_text().splitlines():
            if '"serving"' in line:
                said = json.loads(line)
                return int(said["port"]), int(said["admin"])
        time.sleep(0.05)
    raise AssertionError(log.read_text())
