"""The access log: Envoy's default format string, one line for each request.

Owns the format and the file. Lines are collected and written by a thread of its own, so that a slow disk or a full pipe
never stops traffic; when the writer falls behind by :data:`_MAX_PENDING` bytes, lines are dropped and counted.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from time import gmtime, strftime

from common import logs
from l7proxy.record import Record

_log = logs.get(__name__)

_FLUSH_BYTES = 64 * 1024
_MAX_PENDING = 16 * 1024 * 1024


class AccessLog:
    """``path`` ``-`` is standard output. :meth:`flush` is to be called about once a second.

    :raises OSError: the file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = self._open()
        self._lines: list[str] = []
        self._size = 0
        self._second = -1
        self._prefix = ""
        # Two counters, each with one writer: no lock between the threads.
        self._queued = 0
        self._written = 0
        self.dropped = 0
        self.lines = 0
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        self._thread.start()

    def add(self, record: Record) -> None:
        at = record.started_at
        second = int(at)
        if second != self._second:
            self._second = second
            self._prefix = strftime("[%Y-%m-%dT%H:%M:%S.", gmtime(second))
        head = record.head
        if head is not None:
            get = head.values.get
            method, version, authority = head.method_text, head.minor, head.host or "-"
            forwarded = get(b"x-forwarded-for")
            agent = get(b"user-agent")
        else:
            method, version, authority, forwarded, agent = "-", 1, "-", None, None
        host = record.host
        line = (
            f'{self._prefix}{int((at - second) * 1000):03d}Z] "{method} {record.path or "-"} HTTP/1.{version}" {record.status} '
            f"{record.flags} {record.received} {record.sent} {int(record.duration * 1000)} "
            f"{record.service_time if record.service_time >= 0 else '-'} "
            f'"{forwarded.decode("latin-1") if forwarded else "-"}" "{agent.decode("latin-1") if agent else "-"}" '
            f'"{record.request_id.decode("latin-1")}" "{authority}" "{host.endpoint.host if host is not None else "-"}"\n'
        )
        self._lines.append(line)
        self.lines += 1
        self._size += len(line)
        if self._size >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand what was collected to the writer."""
        lines = self._lines
        if not lines:
            return
        data = "".join(lines).encode("latin-1", "replace")
        if self._queued - self._written + len(data) > _MAX_PENDING:
            self.dropped += len(lines)
        else:
            self._queued += len(data)
            self._queue.put(data)
        self._lines = []
        self._size = 0

    def reopen(self) -> None:
        """Open the file again (after it was rotated away)."""
        if self._path != "-":
            self.flush()
            # The writer may be about to write: its descriptor must never be closed, or be another file's, in between.
            fd = self._open()
            os.dup2(fd, self._fd, inheritable=False)
            os.close(fd)

    def close(self) -> None:
        """Write everything and end the thread; a second time does nothing."""
        if not self._thread.is_alive():
            return
        self.flush()
        self._queue.put(None)
        self._thread.join(5.0)
        if self._path != "-":
            os.close(self._fd)

    def _open(self) -> int:
        if self._path == "-":
            return sys.stdout.fileno()
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _write(self) -> None:
        while (data := self._queue.get()) is not None:
            view = memoryview(data)
            try:
                while view:
                    view = view[os.write(self._fd, view) :]
            except OSError as error:
                self.dropped += bytes(view).count(b"\n")
                _log.error("access log not written", path=self._path, error=str(error))
            self._written += len(data)
