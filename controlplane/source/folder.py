"""A folder of Kubernetes manifests, and which of its objects are in force.

Owns reading (only files that changed) and the rule of the last good state:

- a file that cannot be read keeps all it held; a document of which nobody can tell what it is, likewise;
- an object that its schema refuses keeps its last good version, or is absent if there was none (see
  :mod:`controlplane.standin`);
- two objects of one name: the last good version stays; without one, the first in order of path is in force. Never the
  order of arrival.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import logs
from controlplane.source.lastgood import LastGood
from controlplane.source.manifests import MAX_BYTES, ManifestError, parse
from controlplane.source.objects import Fault, Key, Object, State, Validator, key_of
from controlplane.source.watch import Batch, watch

_log = logs.get(__name__)
SUFFIXES = (".yaml", ".yml", ".json")
_UNREACHABLE = (0, 0, 0)  #: signature of what had no status


@dataclass(frozen=True, slots=True)
class _File:
    """What one file holds: good objects, objects refused, and faults."""

    signature: tuple[int, int, int]
    objects: tuple[Object, ...] = ()
    refused: Mapping[Key, Object] = field(default_factory=dict)
    #: Something in it could not even be told apart: objects that came from this file before may still be meant.
    unknown: bool = False
    faults: tuple[Fault, ...] = ()


class Folder:
    """The source over a folder. Not thread-safe: one task owns it."""

    def __init__(self, root: Path, validate: Validator, last_good: LastGood | None = None) -> None:
        self._root = root
        self._validate = validate
        self._store = last_good
        self._files: dict[str, _File] = {}
        self._in_force: dict[Key, Object] = {}
        self._faults: tuple[Fault, ...] = ()
        self._refused: Mapping[Key, Object] = {}

    def load(self) -> State:
        """Read everything; what is broken falls back to the state that the last run left on disk."""
        if self._store:
            self._in_force = self._store.load()
        return self._update(Batch(frozenset(), frozenset(), everything=True))

    async def changes(self) -> AsyncIterator[State]:
        """A state after each change, a few milliseconds after the last file of it was closed or renamed."""
        async for batch in watch(self._root):
            before = self._in_force, self._faults, self._refused
            state = self._update(batch)
            if (self._in_force, self._faults, self._refused) != before:
                yield state

    def _update(self, batch: Batch) -> State:
        """Read again: files that the batch names whatever they look like, and with ``everything`` all that look new."""
        found: dict[str, _File] = {}
        try:
            for name, status in _walk(self._root):
                if isinstance(status, OSError):
                    found |= self._unreachable(name, status)
                    continue
                signature = (status.st_mtime_ns, status.st_size, status.st_ino)
                known = self._files.get(name)
                stale = name in batch.changed or (
                    (batch.everything or (known is not None and known.signature == _UNREACHABLE))
                    and (known is None or known.signature != signature)
                )
                if stale and name not in batch.writing:
                    found[name] = self._read(name, signature)
                elif known is not None:
                    found[name] = known
        except OSError as e:
            # The folder itself is away: everything stays as it is.
            reason, action = (
                f"the folder cannot be read: {e.strerror}",
                "restore it; all objects stay in force",
            )
            self._faults = (Fault("", "", "", reason, action),)
            return State(self._in_force, self._faults, self._refused)
        self._files = found
        objects, faults = resolve(found, self._in_force)
        if self._store and objects != self._in_force:
            self._store.save(objects)
        self._in_force, self._faults = objects, tuple(sorted(faults))
        self._refused = _refused(found)
        return State(self._in_force, self._faults, self._refused)

    def _unreachable(self, name: str, error: OSError) -> dict[str, _File]:
        """A file whose status, or a folder whose list, is not to be had: all that came from there is kept."""
        reason, action = (
            f"cannot be read: {error.strerror}",
            "restore or remove it; what it held stays in force",
        )
        file = _File(_UNREACHABLE, unknown=True, faults=(Fault(name, "", "", reason, action),))
        below = {o.file for o in self._in_force.values() if o.file.startswith(f"{name}/")}
        return {name: file} | {name: _File(_UNREACHABLE, unknown=True) for name in below}

    def _read(self, name: str, signature: tuple[int, int, int]) -> _File:
        objects: list[Object] = []
        refused: dict[Key, Object] = {}
        faults: list[Fault] = []
        unknown = False
        try:
            if signature[1] > MAX_BYTES:
                raise ManifestError(f"{signature[1]} bytes, at most {MAX_BYTES}")
            data = (self._root / name).read_bytes()
            for document in parse(data, name.endswith(".json")):
                if document.manifest is None:
                    unknown = True
                    faults.append(
                        Fault(name, "", document.where, document.error, "correct it; its last version stays")
                    )
                    continue
                key = key_of(document.manifest)
                problems = self._problems(document.manifest, key)
                if problems:
                    refused.setdefault(key, Object(key, document.manifest, name))
                    faults += [
                        Fault(name, str(key), f, r, "correct it; its last good version stays", key)
                        for f, r in problems
                    ]
                else:
                    objects.append(Object(key, document.manifest, name))
        except FileNotFoundError:
            return _File(signature)  # gone since it was listed; the watch will say so
        except (ManifestError, OSError) as e:
            reason = f"cannot be read: {e.strerror}" if isinstance(e, OSError) and e.strerror else str(e)
            fault = Fault(name, "", "", reason, "correct it; what the file held before stays in force")
            return _File(signature, unknown=True, faults=(fault,))
        return _File(signature, tuple(objects), refused, unknown, tuple(faults))

    def _problems(self, manifest: dict[str, Any], key: Key) -> list[tuple[str, str]]:
        try:
            return list(self._validate(manifest))
        except Exception as e:
            # A bug of the validator's: it costs this object only.
            _log.exception("object cannot be judged", e, object=str(key))
            return [("", f"cannot be judged: {type(e).__name__}: {e}")]


def resolve(
    files: Mapping[str, _File], before: Mapping[Key, Object]
) -> tuple[dict[Key, Object], list[Fault]]:
    """Which objects are in force now, given those before; and all faults."""
    candidates: dict[Key, list[Object]] = {}
    refused: dict[Key, list[str]] = {}
    faults = [fault for file in files.values() for fault in file.faults]
    for name, file in sorted(files.items()):
        for found in file.objects:
            candidates.setdefault(found.key, []).append(found)
        for key in file.refused:
            refused.setdefault(key, []).append(name)
    result: dict[Key, Object] = {}
    for key, objects in candidates.items():
        places = sorted([o.file for o in objects] + refused.get(key, []))
        if len(places) == 1:
            result[key] = objects[0]
            continue
        chosen = before.get(key, objects[0])
        result[key] = chosen
        reason = f"two objects of one name, in {' and '.join(places)}"
        action = f"remove all but one; meanwhile the version from {chosen.file} is in force"
        faults += [
            Fault(place, str(key), "metadata.name", reason, action, key) for place in dict.fromkeys(places)
        ]
    for key in refused:
        if key not in result and key in before:
            result[key] = before[key]
    for key, previous in before.items():
        file_now = files.get(previous.file)
        if key not in result and file_now is not None and file_now.unknown:
            result[key] = previous
    return result, faults


def _refused(files: Mapping[str, _File]) -> dict[Key, Object]:
    """Objects as they are written that are refused everywhere they stand; of several the first in order of path."""
    good = {o.key for file in files.values() for o in file.objects}
    result: dict[Key, Object] = {}
    for _, file in sorted(files.items()):
        for key, refused in file.refused.items():
            if key not in good:
                result.setdefault(key, refused)
    return result


def _walk(root: Path) -> Iterator[tuple[str, os.stat_result | OSError]]:
    """Manifest files below a folder with their status, in order of path; hidden ones are left out.

    A folder or file below that is there and cannot be looked at has its error in place of the status; one that vanishes
    meanwhile is left out.

    :raises OSError: the folder itself cannot be listed.
    """
    yield from _walk_below(root, "", sorted(os.listdir(root)))


def _walk_below(
    root: Path, prefix: str, names: Iterable[str]
) -> Iterator[tuple[str, os.stat_result | OSError]]:
    for name in names:
        if name.startswith("."):
            continue
        path = root / prefix / name
        try:
            if not name.isascii() and (shown := os.fsencode(name).decode(errors="backslashreplace")) != name:
                # It could be neither served on a page nor printed.
                name = shown
                raise OSError(errno.EILSEQ, "its name is no UTF-8 text")
            status = path.stat()
            if stat.S_ISDIR(status.st_mode) and not path.is_symlink():
                yield from _walk_below(root, f"{prefix}{name}/", sorted(os.listdir(path)))
                continue
        except OSError as e:
            # A link that leads nowhere is there, so what it led to was not taken back by anyone.
            if os.path.lexists(path) and (name.endswith(SUFFIXES) or path.is_dir()):
                yield prefix + name, e
            continue
        if stat.S_ISREG(status.st_mode) and name.endswith(SUFFIXES):
            yield prefix + name, status
