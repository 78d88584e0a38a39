"""Whether the programs in force are the very ones that a load would bring: then nothing has to be compiled.

The seal is a digest over everything that decides what a load does (sources, the running kernel, its structures' layout, the
maps, the cgroup) and over what is attached (the number of each program in each link). It is kept in a pinned map of one
element, so that it ends with the pins that it speaks of. Whoever replaced a program, map or link has broken it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from bpf import links, maps

_NAME = "seal"
_KEY = bytes(4)
_SIZE = 32


def digest(sources: Iterable[Path], *values: object) -> bytes:
    """Of files and of values, the running kernel among them. 32 bytes."""
    kernel = os.uname()
    found = hashlib.sha256(repr((kernel.release, kernel.version, kernel.machine, values)).encode())
    for path in sorted(sources):
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)} ".encode())
        found.update(content)
    return found.digest()


def holds(folder: Path, wanted: bytes, pinned: Mapping[str, int], of_pods: Iterable[tuple[str, str]]) -> bool:
    """Whether ``folder`` was sealed with ``wanted``, and is as it was then.

    :param pinned: link pins by name, with where each has to be attached (0: anywhere).
    :param of_pods: pins of programs that are attached where pods are, each with the pattern of its links' pins.
    """
    path = folder / _NAME
    if not path.exists():
        return False
    try:
        with maps.Map.open(str(path)) as kept:
            return kept.lookup(_KEY) == _with_links(folder, wanted, pinned, of_pods)
    except (maps.MapError, links.LinkError):
        return False


def put(folder: Path, wanted: bytes, pinned: Mapping[str, int], of_pods: Iterable[tuple[str, str]]) -> None:
    """Seal ``folder`` as it is now.

    :raises maps.MapError, links.LinkError: it cannot be written, or a link is not as it has to be.
    """
    value = _with_links(folder, wanted, pinned, of_pods)
    path = folder / _NAME
    if path.exists():
        path.unlink()
    with maps.Map.create(maps.ARRAY, _NAME, len(_KEY), _SIZE, 1) as kept:
        kept.update(_KEY, value)
        kept.pin(str(path))


def remove(folder: Path) -> None:
    """The next load compiles."""
    (folder / _NAME).unlink(missing_ok=True)


def _with_links(
    folder: Path, wanted: bytes, pinned: Mapping[str, int], of_pods: Iterable[tuple[str, str]]
) -> bytes:
    found = hashlib.sha256(wanted)
    for name, where in sorted(pinned.items()):
        info = _info(folder / name)
        if where not in (0, info.where):
            raise links.LinkError(0, f"{name} is attached elsewhere")
        found.update(f"{name} {info.id} {info.program} ".encode())
    for name, pattern in of_pods:
        opened = links.open_pin(str(folder / name))
        try:
            program = links.program_id(opened)
        finally:
            os.close(opened)
        found.update(f"{program} ".encode())
        # Pods come and go: each of those that are there has to run this very program.
        for path in folder.glob(pattern):
            info = _info(path)
            if info.program != program:
                raise links.LinkError(0, f"{path.name} runs another program")
    return found.digest()


def _info(path: Path) -> links.LinkInfo:
    link = links.open_pin(str(path))
    try:
        return links.link_info(link)
    finally:
        os.close(link)
