"""What a load finds of other versions of the programs, and how it takes their place: never two at one hook, never none.

Owns the pins of versions (``v<ABI>`` folders): which one is in force, what of it is taken over, and its end. Maps are shared as
long as their elements have the same form (:class:`bpf.schema.MapSpec`), so that pods, verdicts and open connections are the new
programs' from their first moment. Links move by rename; the loader then replaces the programs in them, as within one version.

A map whose elements have another form cannot be shared. Where it only remembers, it begins anew; where verdicts hang on it, the
load is refused and the old programs stay in force: the version that changes such a map has to bring along how it is carried over.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from bpf import schema
from bpf.maps import Map

#: Maps that only remember: what they lose costs an account, a client's backend or a line of the log.
_FORGETTABLE = frozenset(
    {"affinity", "closed", "counters", "datagrams", "events", "flows", "recent", "refused"}
)


class SuccessionError(Exception):
    """What is in force cannot be taken over; it goes on to be."""


def others(pins: Path, folder: Path) -> list[Path]:
    """The folders of other versions, the newest first."""
    found = [path for path in pins.glob("v*") if path != folder and path.name[1:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[1:]), reverse=True)


def predecessor(folder: Path, found: Iterable[Path]) -> Path | None:
    """Of these, the one whose programs are in force while ours are not; None if there is none.

    What an attempt that failed left in ``folder`` is removed then: its maps may be older than those in force.
    """
    if _has_links(folder):
        return None
    before = next((path for path in found if _has_links(path)), None)
    if before is not None:
        remove(folder)
    return before


def take_map(before: Path, spec: schema.MapSpec) -> Map | None:
    """The predecessor's map, the caller's; None for one to be made anew.

    :raises SuccessionError: verdicts hang on it, and its elements have another form.
    """
    path = before / spec.name
    if not path.exists():
        return None
    one = Map.open(str(path))
    if spec.has_form_of(one):
        return one
    one.close()
    if spec.name in _FORGETTABLE:
        return None
    raise SuccessionError(
        f"map {path}: its elements have another form than {spec.kernel_name}, and verdicts hang on them; "
        "the programs in force stay"
    )


def take_links(folder: Path, found: Iterable[Path], patterns: Collection[str]) -> None:
    """Move the links whose names are like these into ``folder``, as they are.

    :raises SuccessionError: one cannot be moved.
    """
    for other in found:
        for path in [path for pattern in patterns for path in other.glob(pattern)]:
            new = folder / path.relative_to(other)
            if path.exists() and not new.exists():
                try:
                    os.rename(path, new)
                except OSError as error:
                    raise SuccessionError(f"link {path}: {error.strerror}") from None


def remove(folder: Path) -> None:
    """The version's pins; whatever of it is attached still is not any more.

    :raises SuccessionError: they cannot be removed.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise SuccessionError(f"pins {error.filename}: {error.strerror}") from None


def _has_links(folder: Path) -> bool:
    return next(folder.glob("link_*"), None) is not None
