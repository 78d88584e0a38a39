"""Which custom kinds a cluster has, and in which version to read each: from its CustomResourceDefinitions.

Only their metadata is followed (schemas are megabytes); of those that matter to a mesh the definition is then read.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common import logs
from common.kubernetes import ApiError, Client, Unreachable, path_of
from common.tasks import Tasks
from controlplane import schema
from controlplane.source.follower import Follower
from controlplane.source.kinds import DEFINITIONS, Kind

_log = logs.get(__name__)
_PATH = path_of("apiextensions.k8s.io/v1", "customresourcedefinitions")
#: Seconds until a definition that could not be read is read again.
_AGAIN = 1.0
#: v2 before v1 before v1beta2 before v1alpha1, as Kubernetes orders them.
_VERSION = re.compile(r"v(\d+)(?:(alpha|beta)(\d+))?")
_STABILITY = {"alpha": 0, "beta": 1, None: 2}


class Definitions:
    """``served`` is called with every kind that is there and its version, whenever that changes."""

    def __init__(
        self,
        client: Client,
        tasks: Tasks,
        served: Callable[[Mapping[Kind, str]], None],
        changed: Callable[[], None],
        patience: float = 0.0,
    ) -> None:
        """``patience``: seconds for which one has to be refused until nobody should wait for it."""
        self._client = client
        self._tasks = tasks
        self._served = served
        self._changed = changed
        self._patience = patience
        self._follower = self._make_follower()
        self._there: set[str] = set()
        self._pages: set[str] = set()
        self._unread: set[str] = set()
        self._versions: dict[Kind, str] = {}
        self._told: dict[Kind, str] | None = None
        self._wake = asyncio.Event()
        self._refused_since: float | None = None
        self._refusal: ApiError | None = None

    @property
    def settled(self) -> bool:
        """True once it is known which kinds there are, or that this cannot be known for now."""
        if not self._follower.synced:
            return self._follower.settled
        return (self._told is not None and not self._unread) or self._given_up

    @property
    def problem(self) -> Exception | None:
        return self._follower.problem or (self._refusal if self._given_up else None)

    @property
    def _given_up(self) -> bool:
        since = self._refused_since
        return since is not None and time.monotonic() - since >= self._patience

    def _make_follower(self) -> Follower:
        return Follower(self._client, _PATH, self, self._changed, metadata_only=True, patience=self._patience)

    def start(self) -> None:
        """Follow, from nothing."""
        self._follower = self._make_follower()
        self._told = None
        self._tasks.start(self._follower.run(), name="customresourcedefinitions")
        self._tasks.start(self._read_all(), name="definitions")

    def restart(self) -> None:
        self._pages = set()

    def page(self, items: Sequence[dict[str, Any]]) -> None:
        self._pages.update(i["metadata"]["name"] for i in items)

    def listed(self) -> None:
        self._there = {name for name in self._pages if name in DEFINITIONS}
        self._versions = {k: v for k, v in self._versions.items() if k.definition in self._there}
        self._unread |= self._there
        self._wake.set()

    def put(self, item: dict[str, Any]) -> None:
        name = item["metadata"]["name"]
        if name in DEFINITIONS:
            self._there.add(name)
            self._unread.add(name)
            self._wake.set()

    def remove(self, item: dict[str, Any]) -> None:
        name = item["metadata"]["name"]
        if name in DEFINITIONS:
            self._there.discard(name)
            self._versions.pop(DEFINITIONS[name], None)
        self._wake.set()

    async def _read_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._refusal = None
            for name in sorted(self._unread):
                await self._read(name)
            self._unread &= self._there
            versions = dict(self._versions)
            if versions != self._told and not self._unread:
                self._told = versions
                self._served(versions)
            if self._refusal is None:
                self._refused_since = None
            elif self._refused_since is None:
                self._refused_since = time.monotonic()
            self._changed()
            if self._unread:
                await asyncio.sleep(_AGAIN)
                self._wake.set()

    async def _read(self, name: str) -> None:
        kind = DEFINITIONS[name]
        self._unread.discard(name)
        try:
            definition = await self._client.get(f"{_PATH}/{name}")
        except ApiError as e:
            if e.status != 404:
                _log.warning("definition cannot be read", name=name, error=str(e))
                self._refusal = self._refusal if e.later else e
                self._unread.add(name)
            else:
                self._there.discard(name)
            return
        except Unreachable:
            self._unread.add(name)
            return
        version = _version(kind, definition)
        # It may be gone again by now: the watch says so, and a stale answer does not bring it back.
        if version and name in self._there:
            self._versions[kind] = version
        # Else it is not established yet, or not any more: while it is there, so are its objects.


def _version(kind: Kind, definition: Mapping[str, Any]) -> str:
    """The best served version that our schema knows, else the best; empty if the kind is not served (yet)."""
    conditions = {c["type"]: c["status"] for c in (definition.get("status") or {}).get("conditions") or ()}
    if conditions.get("Established") != "True" or definition["spec"]["names"]["kind"] != kind.kind:
        return ""
    served = [v["name"] for v in definition["spec"]["versions"] if v["served"]]
    known = [v for v in served if v in schema.versions(kind.group, kind.kind)]
    return max(known or served, key=_priority, default="")


def _priority(version: str) -> tuple[int, int, int, int]:
    match = _VERSION.fullmatch(version)
    if not match:
        return (0, 0, 0, 0)
    return (1, _STABILITY[match[2]], int(match[1]), int(match[3] or 0))
