"""A TCP client in a place of the lab, told from here what to do (``lab/apps/tcp_client.py``)."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from lab.errors import LabError
from lab.place import Place


@dataclass(frozen=True)
class Answer:
    """What the client saw. ``error`` is empty when it went well."""

    values: dict[str, Any]

    @property
    def error(self) -> str:
        return str(self.values.get("error", ""))

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def seconds(self) -> float:
        return float(self.values["seconds"])

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise LabError(f"no {key} in {self.values}")
        return self.values[key]


class Talker:
    """Holds connections open under keys, so that a test can do other things meanwhile."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._process = place.popen(
            place.app("tcp_client"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """End the client; its connections are closed by its kernel."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def __call__(self, op: str, key: str = "main", **values: Any) -> Answer:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"op": op, "key": key, **values}) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise LabError(f"{self._place.name}: the client ended")
        return Answer(json.loads(line))

    def open(self, address: str, port: int, key: str = "main", **values: Any) -> Answer:
        return self("open", key, address=address, port=port, **values)

    def exchange(self, key: str = "main", size: int = 64, times: int = 1, **values: Any) -> Answer:
        return self("exchange", key, size=size, times=times, **values)

    def close(self, key: str = "main", **values: Any) -> Answer:
        return self("close", key, **values)
