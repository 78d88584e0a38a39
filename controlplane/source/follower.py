"""Following one collection of the API: list, watch, resume, list again.

Owns the resource version and when to ask again. What it hears it hands to a :class:`Sink`: a whole list at once (so that
nothing is missing while a list is read again), then single changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from common import logs
from common.kubernetes import ApiError, Client, Unreachable

_log = logs.get(__name__)
#: Seconds: the first pause after a failure, and the longest. An API server that was away for long is found again soon; what
#: was refused from the beginning may wait.
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
_LONGEST_PAUSE_REFUSED = 20.0
#: Failures in a row after which it is said that a collection cannot be followed.
_PATIENCE = 4
#: A watch that ends sooner than this many seconds was none.
_SHORTEST_WATCH = 1.0
_METADATA_ONLY = "application/json;as={};g=meta.k8s.io;v=v1"


class Sink(Protocol):
    """Takes what a follower hears. None of these waits for anything."""

    def page(self, items: Sequence[dict[str, Any]]) -> None:
        """Objects of a list that is not whole yet. Nothing of it counts before :meth:`listed`."""

    def restart(self) -> None:
        """Forget the pages so far: the list begins again."""

    def listed(self) -> None:
        """The list is whole: what is in no page is not there."""

    def put(self, item: dict[str, Any]) -> None:
        """An object is new, or another."""

    def remove(self, item: dict[str, Any]) -> None:
        """An object is gone."""


class Follower:
    """Follows one path. ``changed`` is called when :attr:`settled` or :attr:`problem` become others."""

    def __init__(
        self,
        client: Client,
        path: str,
        sink: Sink,
        changed: Callable[[], None],
        params: Mapping[str, Any] | None = None,
        *,
        metadata_only: bool = False,
        patience: float = 0.0,
    ) -> None:
        """``patience``: seconds for which it has to be refused, and nothing else, until nobody should wait for it."""
        self._client = client
        self._path = path
        self._sink = sink
        self._changed = changed
        self._params = dict(params or {})
        self._watch_params = dict(self._params)
        if metadata_only:
            # What a watch brings are no lists, and who asks for lists there hears nothing at all.
            self._params["accept"] = _METADATA_ONLY.format("PartialObjectMetadataList")
            self._watch_params["accept"] = _METADATA_ONLY.format("PartialObjectMetadata")
        self._patience = patience
        self._version = ""
        self._failures = 0
        self._refusals = 0  #: of these the last ones, in a row, by which the server itself refused
        self._refused_since = 0.0
        self.synced = False  #: a whole list was read once
        self.settled = False  #: synced, or refused for so long that nobody should wait for it
        self.problem: Exception | None = None  #: why it does not follow at the moment, if so for some time
        self.lists = 0
        self.failures = 0

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                if not self._version:
                    await self._list()
                began = time.monotonic()
                await self._watch()
                if time.monotonic() - began >= _SHORTEST_WATCH:
                    self._good()
                    continue
                self._failures += 1
            except ApiError as e:
                if e.expired:
                    _log.info("resource version is too old; listing again", path=self._path)
                    self._version = ""
                    self._failures += 1
                    if self._failures == 1:
                        continue
                else:
                    self._failed(e)
                    if self._failures >= _PATIENCE and e.status not in (429, 503):
                        # Perhaps it is the version: one that a server restored from a backup has yet to reach, say.
                        self._version = ""
            except Unreachable as e:
                self._failed(e)
            except Exception as e:
                # A bug of ours, or an answer that is not what the API promises: from the beginning.
                _log.exception("collection cannot be read", e, path=self._path)
                self._version = ""
                self._failed(ApiError(500, "", f"{type(e).__name__}: {e}"))
            await asyncio.sleep(self._pause())

    def _pause(self) -> float:
        given_up = self.settled and not self.synced
        longest = _LONGEST_PAUSE_REFUSED if given_up else _LONGEST_PAUSE
        return float(min(longest, _FIRST_PAUSE * 2 ** min(self._failures - 1, 20)) * random.uniform(0.5, 1.0))

    def _good(self) -> None:
        self._failures = self._refusals = 0
        self._follows()

    def _follows(self) -> None:
        if self.problem is not None:
            _log.info("followed again", path=self._path)
            self.problem = None
            self._changed()

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self.failures += 1
        now = time.monotonic()
        # An API server that comes back refuses for a while (its own roles are not read yet): time without one is no refusal.
        if not isinstance(error, ApiError) or error.later:
            self._refusals = 0
        else:
            self._refused_since = self._refused_since if self._refusals else now
            self._refusals += 1
        if self._failures < _PATIENCE:
            return
        if self.problem is None or str(self.problem) != str(error):
            _log.warning("cannot be followed; what is known of it stays", path=self._path, error=str(error))
            self.problem = error
            self._changed()
        refused_for_good = self._refusals >= _PATIENCE and now - self._refused_since >= self._patience
        if refused_for_good and not self.settled:
            self.settled = True
            self._changed()

    async def _list(self) -> None:
        self.lists += 1
        try:
            self._version = await self._read(self._params)
        except ApiError as e:
            if not e.expired:
                raise
            # Its pages took longer than the server keeps that state: all at once, then.
            self._version = await self._read(self._params | {"limit": None})
        if not self.synced:
            self.synced = self.settled = True
            self._changed()

    async def _read(self, params: Mapping[str, Any]) -> str:
        self._sink.restart()
        version = ""
        async for items, version in self._client.pages(self._path, **params):  # noqa: B007
            self._sink.page(items)
        if not version:
            raise Unreachable(f"{self._path}: a list without a version")
        self._sink.listed()
        return version

    async def _watch(self) -> None:
        events = self._client.watch(
            self._path, opened=self._follows, **self._watch_params, resourceVersion=self._version
        )
        async with contextlib.aclosing(events):
            async for event in events:
                kind, item = event["type"], event["object"]
                if kind == "DELETED":
                    self._sink.remove(item)
                elif kind in ("ADDED", "MODIFIED"):
                    self._sink.put(item)
                self._version = item["metadata"]["resourceVersion"]
                self._good()
