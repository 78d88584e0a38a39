"""The kernel's headers that the programs can reach, as one tree, which is how bcc wants them.

Debian splits them into a common package and one for the architecture, 60 MB together. What is taken is everything that the seeds
include, and what those include, whatever conditions stand around it: more than a compiler reads, and less than a tenth of all.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from deploy.images.tree import Tree

#: Debian's architecture: the kernel's.
KERNEL = {
    "amd64": "x86", "arm64": "arm64", "armhf": "arm", "i386": "x86", "ppc64el": "powerpc", "riscv64": "riscv", "s390x": "s390",
}  # fmt: skip
#: Where the image has the tree.
TARGET = "usr/src/linux-headers"
#: What bcc itself includes, by command line and before each program.
_BCC = (
    "asm/page.h", "linux/compiler_types.h", "linux/kconfig.h", "linux/log2.h", "linux/version.h",
    "uapi/linux/bpf.h", "uapi/linux/if_packet.h",
)  # fmt: skip
_INCLUDE = re.compile(rb"^\s*#\s*include\s*([<\"])([^>\"]+)[>\"]", re.MULTILINE)


class HeaderError(Exception):
    """The headers are not as they have to be."""


def reachable(whole: Tree, architecture: str, sources: list[Path]) -> Tree:
    """The part of ``whole`` (both packages, at /usr/src) that the C sources need, at :data:`TARGET`."""
    kernel = KERNEL[architecture]
    roots = {path.split("/")[2] for path in whole.entries if path.startswith("usr/src/linux-headers-")}
    # The architecture's own package last: what was generated for this configuration wins.
    files = {}
    for root in sorted(roots, key=lambda name: not name.endswith("-common")):
        prefix = f"usr/src/{root}/"
        files.update(
            {path.removeprefix(prefix): data for path, data in whole.files() if path.startswith(prefix)}
        )
    search = [
        f"arch/{kernel}/include", f"arch/{kernel}/include/generated", "include", f"arch/{kernel}/include/uapi",
        f"arch/{kernel}/include/generated/uapi", "include/uapi", "include/generated/uapi",
    ]  # fmt: skip
    own = {f"bpf/{path.name}": path.read_bytes() for path in sources}
    paths = [found for name in _BCC if (found := _found(name, "", search, files))]
    if len(paths) < len(_BCC):
        missing = [name for name in _BCC if not _found(name, "", search, files)]
        raise HeaderError(f"kernel headers lack {', '.join(missing)}")
    for path, data in own.items():
        paths += _includes(data, path, search, files)
    taken: set[str] = set()
    while paths:
        path = paths.pop()
        if path in taken:
            continue
        taken.add(path)
        paths += _includes(files[path], path, search, files)
    result = Tree()
    for path in taken:
        result.add(f"{TARGET}/{path}", files[path])
    # bcc looks whether this is there at all.
    result.add(f"{TARGET}/include/config/auto.conf", files.get("include/config/auto.conf", b""))
    return result


def _includes(data: bytes, path: str, search: list[str], files: dict[str, bytes]) -> list[str]:
    found = []
    for kind, name in _INCLUDE.findall(data):
        beside = posixpath.dirname(path) if kind == b'"' else ""
        if at := _found(name.decode(), beside, search, files):
            found.append(at)
    return found


def _found(name: str, beside: str, search: list[str], files: dict[str, bytes]) -> str:
    for folder in ([beside] if beside else []) + search:
        path = posixpath.normpath(f"{folder}/{name}")
        if path in files:
            return path
    return ""
