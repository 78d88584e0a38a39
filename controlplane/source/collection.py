"""The objects of one kind as the API server has them, and which version of each is in force."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

from common import logs
from controlplane.source.kinds import Kind, trim
from controlplane.source.objects import Fault, Key, Object, Validator

_log = logs.get(__name__)
_ACTION = "correct it; its last good version stays"


class _Found(NamedTuple):
    """One object as it was read. ``object`` is None if it is the one already known."""

    version: str
    object: Object | None
    problems: tuple[tuple[str, str], ...] = ()


class Table:
    """What all collections share: objects in force and faults. ``dirty`` is called when either has changed."""

    def __init__(self, validate: Validator, dirty: Callable[[Key], None]) -> None:
        self.validate = validate
        self.dirty = dirty
        self.objects: dict[Key, Object] = {}
        self.faults: dict[Key, tuple[Fault, ...]] = {}
        self.refused: dict[Key, Object] = {}  #: objects with faults, as they are written

    def of(self, kinds: Container[tuple[str, str]]) -> list[Key]:
        """Keys of all objects of these kinds (group, kind), in force or refused."""
        return [k for k in self.objects | self.refused if (k.group, k.kind) in kinds]

    def remove(self, key: Key) -> None:
        """An object is gone."""
        self.refused.pop(key, None)
        gone = self.objects.pop(key, None) is not None
        if (self.faults.pop(key, None) is not None) or gone:
            self.dirty(key)


class Collection:
    """A follower's sink for one kind, or for one object of it.

    ``known`` are the keys that the last run knew: they go with the first whole list if they are not in it.
    """

    def __init__(self, table: Table, kind: Kind, version: str, known: Sequence[Key] = ()) -> None:
        self._table = table
        self._kind = kind
        self._api_version = f"{kind.group}/{version}" if kind.group else version
        self._versions: dict[Key, str] = dict.fromkeys(known, "")
        self._pages: dict[Key, _Found] = {}

    @property
    def keys(self) -> Sequence[Key]:
        return tuple(self._versions)

    def restart(self) -> None:
        self._pages = {}

    def page(self, items: Sequence[dict[str, Any]]) -> None:
        for item in items:
            key = self._key(item)
            self._pages[key] = self._read(key, item)

    def listed(self) -> None:
        pages, self._pages = self._pages, {}
        for key in [k for k in self._versions if k not in pages]:
            self._remove(key)
        for key, found in pages.items():
            self._take(key, found)

    def put(self, item: dict[str, Any]) -> None:
        key = self._key(item)
        self._take(key, self._read(key, item))

    def remove(self, item: dict[str, Any]) -> None:
        self._remove(self._key(item))

    def clear(self) -> None:
        """The kind itself is gone, and all of it."""
        for key in self.keys:
            self._remove(key)

    def _key(self, item: Mapping[str, Any]) -> Key:
        metadata = item["metadata"]
        return Key(self._kind.group, self._kind.kind, metadata.get("namespace") or "", metadata["name"])

    def _read(self, key: Key, item: Mapping[str, Any]) -> _Found:
        version = item["metadata"]["resourceVersion"]
        if self._versions.get(key) == version:
            return _Found(version, None)
        manifest = trim(self._kind, self._api_version, item)
        known = self._table.objects.get(key)
        if known is not None and known.manifest == manifest and key not in self._table.faults:
            return _Found(version, None)
        return _Found(version, Object(key, manifest), tuple(self._problems(key, manifest)))

    def _problems(self, key: Key, manifest: dict[str, Any]) -> list[tuple[str, str]]:
        try:
            return list(self._table.validate(manifest))
        except Exception as e:
            # A bug of the validator's: it costs this object only.
            _log.exception("object cannot be judged", e, object=str(key))
            return [("", f"cannot be judged: {type(e).__name__}: {e}")]

    def _take(self, key: Key, found: _Found) -> None:
        self._versions[key] = found.version
        if found.object is None:
            return
        table = self._table
        known = table.objects.get(key)
        if found.problems:
            if known is not None and _uid(known) != _uid(found.object):
                # Deleted, and made anew while nobody was told: what was in force was another object's.
                table.remove(key)
            faults = tuple(
                Fault("", str(key), field, reason, _ACTION, key) for field, reason in found.problems
            )
            refused = table.refused.get(key)
            if (
                table.faults.get(key) != faults
                or refused is None
                or refused.manifest != found.object.manifest
            ):
                table.faults[key] = faults
                table.refused[key] = found.object
                table.dirty(key)
            return
        cleared = table.faults.pop(key, None) is not None
        table.refused.pop(key, None)
        if known is None or known.manifest != found.object.manifest:
            table.objects[key] = found.object
            table.dirty(key)
        elif cleared:
            table.dirty(key)

    def _remove(self, key: Key) -> None:
        self._versions.pop(key, None)
        self._table.remove(key)


def _uid(found: Object) -> object:
    return found.manifest["metadata"].get("uid")
