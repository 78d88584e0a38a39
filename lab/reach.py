"""Makes this checkout readable in a node for whoever is not root: it may lie in somebody's home, which others cannot enter.

Owns nothing but lines of shell, for a mount namespace of the node's own. Nobody's modes are changed.
"""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from lab.errors import LabError


def cache() -> Path:
    """Where ``scripts/setup`` keeps the kernel headers."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MYCEL_CACHE") or home / "mycel")


def needed() -> list[Path]:
    """What the mesh's processes read: code, interpreter, the cache with the kernel's headers.

    :raises LabError: the checkout's own mode keeps others out.
    """
    checkout = Path(__file__).resolve().parents[1]
    if checkout.stat().st_mode & 0o005 != 0o005:
        raise LabError(
            f"{checkout} is not readable for others, and the lab's proxies are not root (chmod o+rX)"
        )
    prefixes = (Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent)
    return [path.resolve() for path in (checkout, *prefixes, cache()) if path.exists()]


def script(paths: Iterable[Path]) -> str:
    """Lines that put, over each folder that others cannot enter, an empty one that has only ``paths`` in it.

    Empty when all of them can be reached as it is.
    """
    blockers: dict[Path, list[Path]] = {}
    for path in dict.fromkeys(paths):
        blocker = next((p for p in reversed(path.parents) if not p.stat().st_mode & stat.S_IXOTH), None)
        if blocker is not None:
            blockers.setdefault(blocker, []).append(path)
    lines: list[str] = []
    for blocker, found in blockers.items():
        # One within another comes with it.
        outer = [path for path in found if not any(other in path.parents for other in found)]
        for number, path in enumerate(outer):
            lines += [f"mkdir -p /run/reach/{number}", f"mount --bind {_quoted(path)} /run/reach/{number}"]
        lines.append(f"mount -t tmpfs -o mode=755 lab {_quoted(blocker)}")
        for number, path in enumerate(outer):
            lines += [f"mkdir -p {_quoted(path)}", f"mount --move /run/reach/{number} {_quoted(path)}"]
    return "\n".join(lines)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
