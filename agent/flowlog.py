"""Flow records: one line for each end of a connection or conversation that has ended, or was refused, in this node's kernel.

Owns the reading of the kernel's ring buffer ``records``, the newest of them in memory (as the kernel wrote them: they are taken
apart when somebody asks), and a log of JSON lines if one is wanted, bounded in its rate and size. What is lost is counted where
it is lost: by the kernel when nobody reads fast enough, here by the log's rate or a file that cannot be written. Sums are
elsewhere (:mod:`agent.metrics`) and lose nothing.
"""

from __future__ import annotations

import asyncio
import datetime
import io
import ipaddress
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from bpf import wire
from common import logs
from common.admin import BadQueryError

_log = logs.get(__name__)

#: Records that are kept in memory.
KEEP = 4096
#: Lines per second that are written at most, and bytes after which a file begins anew (``FILE.1`` is the one before).
RATE = 1000
FILE_SIZE = 64 << 20
#: Seconds between two looks into the ring buffer, which has room for about 7,500 records.
INTERVAL = 0.1
#: Records of one look, so that a flood is the kernel's to count and not this process's to bear.
_BATCH = 5000
#: Seconds between two runs of what ends silent conversations, and between two complaints about the log.
IDLE_INTERVAL = 5.0
_COMPLAIN = 60.0


class Source(Protocol):
    """The kernel, as far as this needs it."""

    def read_records(self, most: int) -> Iterator[bytes]: ...
    def records_pending(self) -> int: ...
    def end_silent_conversations(self) -> None: ...


class Names(NamedTuple):
    """What turns the kernel's numbers into what people know."""

    name: Callable[[int], str]  #: of an identity: ``NAMESPACE/WORKLOAD``
    principal: Callable[[int], str]  #: of an identity: its SPIFFE ID, or ""
    zone: Callable[[int], str]
    pod: Callable[[int], str]  #: of a netns cookie: ``NAMESPACE/NAME``, or ""


class Counts(NamedTuple):
    """Since this process began."""

    read: int
    written: int
    over_rate: int  #: not written, since there were too many
    failed: int  #: not written, since the log could not be


class Sink:
    """A file or the standard output, to which lines are added; bounded in rate and size. Time is an argument."""

    def __init__(self, path: str, *, rate: int = RATE, size: int = FILE_SIZE) -> None:
        """:param path: of a file, or ``-`` for standard output (whose size is somebody else's)."""
        self._path = None if path == "-" else Path(path)
        self._rate = rate
        self._size = size
        self._tokens = float(rate)
        self._filled: float | None = None
        self._file: io.FileIO | None = None
        self._complained = -_COMPLAIN

    def room(self, now: float) -> int:
        """How many lines may be written at this moment."""
        if self._filled is not None:
            self._tokens = min(float(self._rate), self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        return int(self._tokens)

    def write(self, lines: list[bytes], now: float) -> bool:
        """Whether they are written, all of them; the log says why not."""
        self._tokens -= len(lines)
        data = b"".join(line + b"\n" for line in lines)
        try:
            if self._path is None:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            else:
                self._write_file(self._path, data)
        except OSError as error:
            if now - self._complained >= _COMPLAIN:
                self._complained = now
                where = str(self._path or "standard output")
                _log.error("flow records cannot be written", file=where, reason=error.strerror)
            return False
        return True

    def _write_file(self, path: Path, data: bytes) -> None:
        file = self._file
        if file is None or not self._is_ours(file, path):
            self.close()
            file = self._file = io.FileIO(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a")
        if file.tell() and file.tell() + len(data) > self._size:
            os.replace(path, f"{path}.1")
            self.close()
            return self._write_file(path, data)
        before = file.tell()
        try:
            while data:
                data = data[file.write(data) or 0 :]
        except OSError:
            # No half line: whoever reads the file reads lines.
            file.truncate(before)
            raise

    @staticmethod
    def _is_ours(file: io.FileIO, path: Path) -> bool:
        """Whether the open file still is the one of that name: somebody else may turn logs over."""
        try:
            named = path.stat()
        except FileNotFoundError:
            return False
        opened = os.fstat(file.fileno())
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class FlowLog:
    """See the module. ``newest`` may be called from any thread."""

    def __init__(self, source: Source, names: Names, *, keep: int = KEEP, sink: Sink | None = None) -> None:
        self._source = source
        self._names = names
        self._newest: deque[bytes] = deque(maxlen=keep)
        self._lock = threading.Lock()
        self._sink = sink
        self._read = self._written = self._over_rate = self._failed = 0

    @property
    def counts(self) -> Counts:
        return Counts(self._read, self._written, self._over_rate, self._failed)

    async def run(self) -> None:
        """Until cancelled; what the kernel has then is the successor's."""
        loop = asyncio.get_running_loop()
        idle_at = loop.time()
        while True:
            if loop.time() >= idle_at:
                idle_at = loop.time() + IDLE_INTERVAL
                await asyncio.to_thread(self._source.end_silent_conversations)
            if self._source.records_pending():
                await asyncio.to_thread(self.drain, loop.time())
            await asyncio.sleep(INTERVAL)

    def drain(self, now: float) -> int:
        """Take over what the kernel has, one batch at most; how many. ``now`` in seconds of a clock that never goes back."""
        size = wire.FlowRecord.LAYOUT.size
        batch: list[bytes] = []
        for record in self._source.read_records(_BATCH):
            if len(record) == size:
                batch.append(record)
        with self._lock:
            self._newest.extend(batch)
        self._read += len(batch)
        if self._sink is not None and batch:
            room = self._sink.room(now)
            self._over_rate += max(0, len(batch) - room)
            lines = [msgspec.json.encode(self._shown(record)) for record in batch[:room]]
            if lines:
                if self._sink.write(lines, now):
                    self._written += len(lines)
                else:
                    self._failed += len(lines)
        return len(batch)

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()

    def newest(self, query: Mapping[str, str]) -> list[dict[str, object]]:
        """The newest records, the latest first.

        :param query: ``newest`` (how many, at most), and what they have to be: ``source``, ``destination`` (NAMESPACE/WORKLOAD or
            NAMESPACE), ``pod`` (NAMESPACE/NAME), ``address``, ``port`` (the server's), ``protocol``, ``direction``,
            ``verdict`` or ``reason``.
        :raises BadQueryError: a parameter or its value is unknown.
        """
        most, wanted = _parse(query)
        with self._lock:
            records = list(self._newest)
        found: list[dict[str, object]] = []
        for data in reversed(records):
            if len(found) >= most:
                break
            shown = self._shown(data)
            if all(matches(shown) for matches in wanted):
                found.append(shown)
        return found

    def _shown(self, data: bytes) -> dict[str, object]:
        record = wire.FlowRecord.unpack(data)
        names = self._names
        refused = record.verdict != wire.VERDICT_ALLOWED
        shown: dict[str, object] = {
            "started": _wall(record.started),
            "ended": _wall(record.ended),
            "seconds": round((record.ended - record.started) / 1e9, 6),
            "protocol": protocol_name(record.protocol),
            "direction": wire.Direction(record.direction).name.lower(),
            "client": _end(record.client_address, record.client_port),
            "server": _end(record.server_address, record.server_port),
            "pod": names.pod(record.netns),
            "source": names.name(record.source),
            "destination": names.name(record.destination),
            "source_principal": names.principal(record.source),
            "destination_principal": names.principal(record.destination),
            "source_zone": names.zone(record.source_zone),
            "destination_zone": names.zone(record.destination_zone),
            "verdict": "refused" if refused else "allowed",
            "reason": reason_name(record.verdict),
            "via": via_name(record.kind),
            "sent": record.sent,
            "received": record.received,
        }
        if record.protocol == wire.PROTOCOL_UDP:
            shown["sent_datagrams"] = record.sent_datagrams
            shown["received_datagrams"] = record.received_datagrams
        else:
            shown["rtt_us"] = record.rtt_us
            shown["retransmits"] = record.retransmits
        return shown


def protocol_name(number: int) -> str:
    match number:
        case wire.PROTOCOL_TCP:
            return "tcp"
        case wire.PROTOCOL_UDP:
            return "udp"
    return str(number)


def reason_name(verdict: int) -> str:
    """Of a verdict; "" for what is allowed."""
    if verdict == wire.VERDICT_ALLOWED:
        return ""
    if verdict == wire.VERDICT_SEVERAL:
        return "several"
    try:
        return wire.Reason(verdict).name.lower().replace("_", "-")
    except ValueError:
        return str(verdict)


def via_name(kind: int) -> str:
    try:
        return wire.Via(kind).name.lower()
    except ValueError:
        return ""


def _wall(nanoseconds: int) -> str:
    """A time of the kernel's monotonic clock as UTC."""
    offset = time.time_ns() - time.monotonic_ns()
    moment = datetime.datetime.fromtimestamp((nanoseconds + offset) / 1e9, datetime.UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _end(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


_Matches = Callable[[Mapping[str, object]], bool]


def _parse(query: Mapping[str, str]) -> tuple[int, list[_Matches]]:
    most = 100
    wanted: list[_Matches] = []
    for key, value in query.items():
        match key:
            case "newest":
                if not value.isdecimal() or not 1 <= int(value) <= 1_000_000:
                    raise BadQueryError(f"newest={value}: not a number from 1 on")
                most = int(value)
            case "source" | "destination":
                wanted.append(_is_workload(key, value))
            case "pod" | "protocol" | "direction" | "verdict" | "reason":
                _require(key, value)
                wanted.append(_is(key, value))
            case "port":
                if not value.isdecimal() or not 0 <= int(value) <= 0xFFFF:
                    raise BadQueryError(f"port={value}: no port")
                wanted.append(_ends_with("server", f":{int(value)}"))
            case "address":
                try:
                    address = str(ipaddress.ip_address(value))
                except ValueError:
                    raise BadQueryError(f"address={value}: no address") from None
                wanted.append(_has_address(address))
            case _:
                raise BadQueryError(
                    f"{key}: no such parameter; there are newest, source, destination, pod, address, port, protocol, "
                    "direction, verdict, reason"
                )
    return most, wanted


def _require(key: str, value: str) -> None:
    allowed: Iterable[str] = {
        "protocol": ("tcp", "udp"),
        "direction": [direction.name.lower() for direction in wire.Direction],
        "verdict": ("allowed", "refused"),
        "reason": [reason_name(reason) for reason in wire.Reason],
    }.get(key, (value,))
    if value not in allowed:
        raise BadQueryError(f"{key}={value}: not one of {', '.join(allowed)}")


def _is(key: str, value: str) -> _Matches:
    return lambda shown: shown[key] == value


def _is_workload(key: str, value: str) -> _Matches:
    return lambda shown: shown[key] == value or str(shown[key]).partition("/")[0] == value


def _ends_with(key: str, value: str) -> _Matches:
    return lambda shown: str(shown[key]).endswith(value)


def _has_address(address: str) -> _Matches:
    prefix = f"[{address}]:" if ":" in address else f"{address}:"
    return lambda shown: any(str(shown[end]).startswith(prefix) for end in ("client", "server"))
