"""Which files below a folder have changed: inotify, with an eye on writers that are not done.

A file counts as changed when it was closed after writing, moved, linked or removed. While someone is writing to it (and it
is not yet closed) it is not reported, so half-written files are not read; a writer that stays silent for
:data:`QUIET` seconds without closing counts as done. Changes that come together are reported together.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import stat
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from common import logs

_log = logs.get(__name__)

#: Seconds without an event after which a batch is reported, and the most that a batch waits.
SETTLE = 0.01
SETTLE_MOST = 0.05
#: Seconds between looks for a root folder that is away.
_ROOT_AWAY = 0.2
#: Seconds of silence after which a file that is still open for writing is taken as it is.
QUIET = 2.0

_IN_MODIFY = 0x2
_IN_ATTRIB = 0x4
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_DELETE_SELF = 0x400
_IN_MOVE_SELF = 0x800
_IN_Q_OVERFLOW = 0x4000
_IN_IGNORED = 0x8000
_IN_ONLYDIR = 0x01000000
_IN_ISDIR = 0x40000000
_MASK = (
    _IN_MODIFY
    | _IN_ATTRIB
    | _IN_MOVE_SELF
    | _IN_CLOSE_WRITE
    | _IN_MOVED_FROM
    | _IN_MOVED_TO
    | _IN_CREATE
    | _IN_DELETE
    | _IN_DELETE_SELF
)
_EVENT = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Batch:
    """Relative paths of files that changed, and of those that are being written and better left alone."""

    changed: frozenset[str]
    writing: frozenset[str]
    everything: bool = False  #: others may have changed too: look at all


async def watch(root: Path) -> AsyncIterator[Batch]:
    """What changed, batch by batch. The first covers what happened before the watch stood."""
    watcher = _Watcher(root)
    try:
        yield Batch(frozenset(), frozenset(), everything=True)
        while True:
            yield await watcher.batch()
    finally:
        watcher.close()


class _Watcher:
    def __init__(self, root: Path) -> None:
        self._root = root
        self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self._folders: dict[int, str] = {}  # watch descriptor -> relative path with a closing slash
        self._changed: set[str] = set()
        self._everything = False
        self._writing: dict[str, float] = {}  # files written to and not closed: time of the last write
        self._readable = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._readable.set)
        self._add("")

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    async def batch(self) -> Batch:
        """Wait for a change and until no other follows closely."""
        deadline = None
        while True:
            ready = self._ready()
            now = self._loop.time()
            if ready and deadline is None:
                deadline = now + SETTLE_MOST
            wait = min(SETTLE, deadline - now) if ready and deadline is not None else self._next_quiet(now)
            try:
                if wait is not None and wait <= 0:
                    raise TimeoutError
                async with asyncio.timeout(wait):
                    await self._readable.wait()
            except TimeoutError:
                if ready:
                    return self._take()
                continue
            self._readable.clear()
            self._read()

    def _next_quiet(self, now: float) -> float | None:
        """Seconds until the folder must be looked at without an event: a silent writer, or a root that is away."""
        if not self._folders:
            self._add("")
            if not self._folders:
                return _ROOT_AWAY
            self._everything = True
            return 0
        return max(0.0, min(self._writing.values()) + QUIET - now) + 0.001 if self._writing else None

    def _ready(self) -> bool:
        now = self._loop.time()
        for path in [p for p, at in self._writing.items() if now - at >= QUIET]:
            del self._writing[path]
            self._changed.add(path)
        return self._everything or bool(self._changed - self._writing.keys())

    def _take(self) -> Batch:
        everything, self._everything = self._everything, False
        writing = frozenset(self._writing)
        changed = frozenset(self._changed - writing)
        self._changed -= changed
        return Batch(changed, writing, everything)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            wd, mask, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size
            name = os.fsdecode(data[at : at + length].rstrip(b"\0"))
            at += length
            self._event(wd, mask, name)

    def _event(self, wd: int, mask: int, name: str) -> None:
        if mask & _IN_Q_OVERFLOW:
            _log.warning("inotify queue overflowed; reading the whole folder", folder=str(self._root))
            self._everything = True
            return
        if mask & _IN_IGNORED:
            self._folders.pop(wd, None)
            return
        prefix = self._folders.get(wd)
        if prefix is None:
            return
        if not prefix and mask & (_IN_MOVE_SELF | _IN_DELETE_SELF):
            _log.warning("the folder is away; waiting for it", folder=str(self._root))
            for watch_descriptor in self._folders:
                _libc.inotify_rm_watch(self._fd, watch_descriptor)
            self._folders.clear()
            self._writing.clear()
            self._everything = True
            return
        path = prefix + name
        if mask & _IN_DELETE_SELF or mask & _IN_ISDIR:
            if mask & (_IN_CREATE | _IN_MOVED_TO):
                self._add(path + "/")
            if mask & (_IN_CREATE | _IN_MOVED_TO | _IN_MOVED_FROM | _IN_DELETE | _IN_DELETE_SELF):
                self._everything = True
        elif mask & _IN_MODIFY:
            self._writing[path] = self._loop.time()
        elif mask & (_IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_MOVED_FROM | _IN_DELETE):
            self._writing.pop(path, None)
            self._changed.add(path)
            if os.path.islink(self._root / path):
                # It may lead to a folder's worth of files (how Kubernetes swaps a ConfigMap's content).
                self._everything = True
        elif mask & _IN_ATTRIB:
            self._changed.add(path)
        elif mask & _IN_CREATE:
            self._created(path)

    def _created(self, path: str) -> None:
        """A new name: complete at once if it is a link, else its writer closes it later."""
        try:
            status = os.lstat(self._root / path)
        except OSError:
            return
        if stat.S_ISLNK(status.st_mode) or status.st_nlink > 1:
            self._changed.add(path)
            self._everything = True
        else:
            self._writing[path] = self._loop.time()

    def _add(self, prefix: str) -> None:
        """Watch a folder and all below it. What vanishes meanwhile is no error."""
        folder = self._root / prefix
        wd = _libc.inotify_add_watch(self._fd, os.fsencode(folder), _MASK | _IN_ONLYDIR)
        if wd < 0:
            if prefix:  # the root's absence was logged already
                error = os.strerror(ctypes.get_errno())
                _log.warning("folder cannot be watched", folder=str(folder), error=error)
            return
        self._folders[wd] = prefix
        try:
            entries = list(os.scandir(folder))
        except OSError:
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                self._add(f"{prefix}{entry.name}/")


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
