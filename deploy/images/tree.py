"""The files of a layer, in memory: what is in them, not how they came to be or how they are written.

Paths have no leading slash. Times and owners are not kept: a layer has one time, and everything is root's.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: Debian's merged /usr: packages may still say /lib.
_MERGED = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
#: Not needed at run time; the licences (``copyright``) stay, because whoever passes the image on has to pass them on.
_DOCUMENTATION = (
    "usr/share/doc/",
    "usr/share/info/",
    "usr/share/lintian/",
    "usr/share/locale/",
    "usr/share/man/",
)


@dataclass(frozen=True)
class Entry:
    """A file (``data``), a symbolic link (``link``) or a folder (neither)."""

    mode: int
    data: bytes | None = None
    link: str = ""


@dataclass
class Tree:
    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        self.entries[path] = Entry(mode, data.encode() if isinstance(data, str) else data)

    def folder(self, path: str, mode: int = 0o755) -> None:
        self.entries[path] = Entry(mode)

    def link(self, path: str, target: str) -> None:
        self.entries[path] = Entry(0o777, link=target)

    def add_archive(self, archive: tarfile.TarFile) -> None:
        """Take over an archive's files, as a Debian package has them; documentation is left out."""
        for member in archive:
            path = merged(member.name.removeprefix("./").strip("/"))
            if not path or not wanted(path):
                continue
            mode = member.mode & 0o755
            if member.issym():
                self.link(path, member.linkname)
            elif member.islnk():
                self.entries[path] = self.entries[merged(member.linkname.removeprefix("./"))]
            elif member.isreg():
                file = archive.extractfile(member)
                assert file is not None
                self.add(path, file.read(), mode)

    def add_folder(self, source: Path, target: str) -> None:
        """Take over the files below ``source``."""
        for path in sorted(source.rglob("*")):
            name = f"{target}/{path.relative_to(source)}"
            if path.is_symlink():
                self.link(name, str(path.readlink()))
            elif path.is_file():
                self.add(name, path.read_bytes(), path.stat().st_mode & 0o755)

    def drop(self, patterns: list[str]) -> None:
        """Remove files, and folders with what is in them."""
        for path in list(self.entries):
            parts = path.split("/")
            names = ["/".join(parts[: n + 1]) for n in range(len(parts))]
            if any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns):
                del self.entries[path]

    def files(self, suffix: str = "") -> Iterator[tuple[str, bytes]]:
        for path, entry in sorted(self.entries.items()):
            if entry.data is not None and path.endswith(suffix):
                yield path, entry.data

    def tar(self, file: io.BufferedIOBase | io.BytesIO, *, mtime: int) -> None:
        """Write the layer: sorted, each folder before what is in it, owned by root."""
        whole = dict(self.entries)
        for path in self.entries:
            parts = path.split("/")[:-1]
            for n in range(len(parts)):
                whole.setdefault("/".join(parts[: n + 1]), Entry(0o755))
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for path in sorted(whole, key=lambda p: p.split("/")):
                entry = whole[path]
                info = tarfile.TarInfo(path)
                info.mode = entry.mode
                info.mtime = mtime
                if entry.link:
                    info.type, info.linkname = tarfile.SYMTYPE, entry.link
                elif entry.data is None:
                    info.type = tarfile.DIRTYPE
                else:
                    info.size = len(entry.data)
                archive.addfile(info, io.BytesIO(entry.data) if entry.data is not None else None)


def merged(path: str) -> str:
    """The path on a system where /lib and its like are links into /usr."""
    return f"usr/{path}" if path.split("/", 1)[0] in _MERGED else path


def wanted(path: str) -> bool:
    return not path.startswith(_DOCUMENTATION) or (
        path.startswith("usr/share/doc/") and path.endswith("/copyright")
    )


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
