"""Steady traffic in a place of the lab, whose every outcome is written down (``lab/apps/traffic.py``, ``http_client.py``)."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from types import TracebackType
from typing import Any, Self

from lab.place import Place


class Traffic:
    """Runs one of the lab's clients until :meth:`end`, and keeps what it wrote in a file: a pipe would fill and stop it."""

    def __init__(self, place: Place, app: str, *arguments: object) -> None:
        self._file = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the traffic
        self._process = place.popen(place.app(app, *arguments), stdout=self._file)

    @classmethod
    def echo(
        cls,
        place: Place,
        address: str,
        port: int,
        *,
        timeout: float = 12.0,
        interval: float = 0.02,
        count: int = 0,
    ) -> Self:
        """New connections to an echo server that greets, one after the other."""
        options = ["--greeted", "--timeout", timeout, "--interval", interval, "--count", count]
        return cls(place, "traffic", address, port, *options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._file.closed:
            self.end()

    def _records(self) -> int:
        """So many are written. The file's offset is shared with the process that writes, and stays where it is."""
        descriptor = self._file.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).count(b"\n")

    def wait(self, timeout: float) -> list[dict[str, Any]]:
        """Wait for its own end (``count``), and give back the records."""
        self._process.wait(timeout)
        return self.end()

    def end(self, patience: float = 20.0, *, at_least: int = 0) -> list[dict[str, Any]]:
        """End it, and give back one record per connection or request.

        An echo client ends what is under way first, so that its records are all that it did.

        :param patience: seconds.
        :param at_least: so many records first, if they come within ``patience``: a busy machine makes few in a given time.
        """
        deadline = time.monotonic() + patience
        while self._records() < at_least and time.monotonic() < deadline and self._process.poll() is None:
            time.sleep(0.05)
        self._process.terminate()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._file.seek(0)
        lines = self._file.read().split("\n")
        self._file.close()
        # The last piece is empty, or a line that was cut.
        return [json.loads(line) for line in lines[:-1]]
