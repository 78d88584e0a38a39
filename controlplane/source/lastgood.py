"""The last state that was in force, on disk: what a restart falls back to for whatever is broken by then.

One JSON file, replaced as a whole. It holds every object in force with the file it came from; an object that is gone from
the folder is gone from here too, so this is no second source.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from common import logs
from controlplane.source.objects import Key, Object, key_of

_log = logs.get(__name__)
_FORMAT = 1


class LastGood:
    """Reads and writes the file. Errors are logged and never stop the source: static configuration is better than none."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> dict[Key, Object]:
        """The objects of the last run; none if there was no run or the file is broken (which is logged)."""
        try:
            data = json.loads(self._path.read_bytes())
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']}, not {_FORMAT}")
            objects = [Object(key_of(e["manifest"]), e["manifest"], e["file"]) for e in data["objects"]]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            _log.error(
                "last good state cannot be read; starting without it", path=str(self._path), error=str(e)
            )
            return {}
        return {o.key: o for o in objects}

    def save(self, objects: Mapping[Key, Object]) -> None:
        """Replace the file by these objects."""
        # Object by object: in a thread, one call for all of a large mesh would hold up whoever else has something to do.
        entries = b",".join(
            msgspec.json.encode({"file": o.file, "manifest": o.manifest}) for _, o in sorted(objects.items())
        )
        data = b'{"format":%d,"objects":[%b]}' % (_FORMAT, entries)
        temporary = self._path.with_name(self._path.name + ".new")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
                f.write(data)
            temporary.replace(self._path)
        except OSError as e:
            _log.error("last good state cannot be written", path=str(self._path), error=str(e))
