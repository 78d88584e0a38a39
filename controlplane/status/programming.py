"""Since when which version of a policy object is in force in this controller: so an acknowledged snapshot says what it holds.

Snapshots are counted as they are published. A client has an object's content if the snapshot that it acknowledged was published
(or published again) no earlier than that content came into force. The count is this process's own; between controllers contents
are compared by their digests.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from controlplane.source import Key, Object
from controlplane.status.kinds import is_policy

#: Snapshots that are remembered: clients that still have an older one count as having nothing.
_VERSIONS = 4096
_PLAIN = frozenset({"", "discovery.k8s.io"})


@dataclass(frozen=True, slots=True)
class Content:
    """One version of one object, in force since the snapshot ``since``."""

    object: Object
    id: str  #: the UID; without one (a folder) the key
    digest: str
    since: int

    @property
    def generation(self) -> int | None:
        generation = self.object.manifest["metadata"].get("generation")
        return generation if isinstance(generation, int) else None


class Programming:
    """Fed with each snapshot, in order."""

    def __init__(self) -> None:
        self._sequence = 0
        self._versions: OrderedDict[str, int] = OrderedDict()
        self.contents: Mapping[Key, Content] = {}
        self.by_id: Mapping[str, Content] = {}

    def published(self, version: str, objects: Mapping[Key, Object]) -> None:
        """These objects are in force, as the snapshot ``version``."""
        self._sequence += 1
        self._versions[version] = self._sequence
        self._versions.move_to_end(version)
        while len(self._versions) > _VERSIONS:
            self._versions.popitem(last=False)
        contents: dict[Key, Content] = {}
        for key, o in objects.items():
            # By far most objects are of these groups, and this is done for every snapshot.
            if key[0] in _PLAIN or not is_policy(key.group, key.kind):
                continue
            known = self.contents.get(key)
            if known is None or known.object is not o:
                digest = digest_of(o)
                id = o.manifest["metadata"].get("uid") or str(key)
                same = known is not None and (known.id, known.digest) == (id, digest)
                since = known.since if known is not None and same else self._sequence
                known = Content(o, id, digest, since)
            contents[key] = known
        self.contents = contents
        self.by_id = {c.id: c for c in contents.values()}

    def sequence_of(self, version: str) -> int:
        """When a version was published last; 0 if it is not known."""
        return self._versions.get(version, 0)


def digest_of(o: Object) -> str:
    """Equal for equal content: what a cluster writes into an object on its own is no part of it."""
    metadata = o.manifest["metadata"]
    content = {k: v for k, v in o.manifest.items() if k not in ("metadata", "status")}
    content["metadata"] = {k: metadata[k] for k in ("generation", "labels", "annotations") if k in metadata}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
