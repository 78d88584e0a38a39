"""The node's state on disk: last good configuration, numbering of identities, attached pods.

Owns how files are written (whole or not at all, 0600: they name everything in the mesh) and what happens to one that cannot be
read: it is moved aside and said so, never half believed.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from common import logs

_log = logs.get(__name__)


class Storage:
    """A folder with files that are replaced whole."""

    def __init__(self, folder: Path) -> None:
        """:raises OSError: the folder cannot be made."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        # Threads write too, and each file has one place aside. None waits for another file's disk.
        self._locks: dict[str, threading.Lock] = {}

    def read(self, name: str) -> bytes | None:
        """A file's content, or None if there is none.

        :raises OSError: it is there and cannot be read.
        """
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes, *, outlives_boot: bool = True) -> None:
        """Replace a file's content; after a crash of this process it is the old or the new one.

        :param outlives_boot: it is after a crash of the machine too; that takes as long as the disk does.
        :raises OSError: it could not be written; the old content is still there.
        """
        with self._locks.setdefault(name, threading.Lock()):
            self._write(name, data, outlives_boot)

    def _write(self, name: str, data: bytes, force: bool) -> None:
        aside = self.folder / f".{name}"
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                if force:
                    os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(aside, self.folder / name)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise

    def set_aside(self, name: str, reason: str) -> None:
        """Keep a file that is no use for whoever wants to know why, and go on without it."""
        _log.error("state file is no use and was set aside", file=str(self.folder / name), reason=reason)
        with contextlib.suppress(OSError):
            os.rename(self.folder / name, self.folder / f"{name}.broken")
