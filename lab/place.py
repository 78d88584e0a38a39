"""A place in the lab where commands run: a network namespace and a cgroup."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lab import cgroups, namespaces
from lab.errors import LabError

#: Debian's own interpreter: fast to start, and needs nothing of this checkout.
PYTHON = "/usr/bin/python3"
APPS = Path(__file__).resolve().parent / "apps"


class CommandError(LabError):
    """A command ended with another status than 0."""

    def __init__(self, place: str, command: Sequence[str], status: int, output: str) -> None:
        self.status = status
        self.output = output
        super().__init__(
            f"{place}: {' '.join(command)!r} ended with status {status}: {output.strip()[-2000:]}"
        )


class Place:
    """Runs commands and opens sockets in a network namespace.

    :param net: path of the namespace; opened anew each time, so that nothing here keeps it alive.
    :param mount: path of a mount namespace to enter too, or None to stay in the machine's.
    """

    def __init__(self, name: str, *, net: Path, cgroup: Path, mount: Path | None = None) -> None:
        self.name = name
        self.net = net
        self.mount = mount
        self.cgroup = cgroup

    def command(self, command: Sequence[str], *, cgroup: Path | None = None) -> list[str]:
        """The command line that runs ``command`` here; every step in front of it execs."""
        return [
            *cgroups.joining(cgroup or self.cgroup),
            *namespaces.entering(net=self.net, mount=self.mount),
            *command,
        ]

    def popen(
        self,
        command: Sequence[str],
        *,
        cgroup: Path | None = None,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.STDOUT,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command; its process is the caller's to wait for (the lab's end kills it in any case)."""
        return subprocess.Popen(
            self.command(command, cgroup=cgroup),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            text=True,
        )

    def run(
        self,
        command: Sequence[str],
        *,
        timeout: float = 10.0,
        check: bool = True,
        input: str | None = None,
        cgroup: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, with output and errors in ``stdout`` together.

        :raises CommandError: another status than 0, with ``check``.
        :raises LabError: not done in ``timeout`` seconds (it is killed).
        """
        try:
            done = subprocess.run(
                self.command(command, cgroup=cgroup),
                input=input if input is not None else "",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            seen = (
                (error.stdout or b"").decode(errors="replace")
                if isinstance(error.stdout, bytes)
                else error.stdout
            )
            raise LabError(f"{self.name}: {' '.join(command)!r} took over {timeout} s: {seen}") from error
        if check and done.returncode != 0:
            raise CommandError(self.name, command, done.returncode, done.stdout)
        return done

    def app(self, name: str, *arguments: object) -> list[str]:
        """The command line of one of the lab's small programs (``lab/apps``)."""
        return [PYTHON, "-I", str(APPS / f"{name}.py"), *map(str, arguments)]

    def socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        """A socket in this namespace, used from here. Whoever holds it keeps the namespace alive."""
        return namespaces.open_socket(self.net, family, kind, protocol)

    def listening(self, port: int, *, kind: str = "tcp") -> bool:
        """Whether somebody listens on the port in this namespace, told without a packet."""
        done = self.run(["/usr/bin/cat", f"/proc/self/net/{kind}", f"/proc/self/net/{kind}6"])
        suffix = f":{port:04X}"
        wanted = "0A" if kind == "tcp" else "07"
        for line in done.stdout.splitlines():
            fields = line.split()
            if len(fields) > 3 and fields[1].endswith(suffix) and fields[3] == wanted:
                return True
        return False

    def ip(self, batch: str) -> None:
        """Run lines of ``ip -batch`` here."""
        self.run(["/usr/sbin/ip", "-batch", "-"], input=batch)
