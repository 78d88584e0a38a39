"""Keeps the verdicts true: judges again when something was published, and as long as an object waits for somebody.

Runs on every controller, so that every ``/debug/status`` is right; only the leader writes what comes out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol

from controlplane.clients import Clients
from controlplane.model.findings import Finding
from controlplane.source import Key, Object
from controlplane.status.board import Board, Member, Outcome, Replica, Verdict
from controlplane.status.programming import Programming
from controlplane.status.replicas import holding

#: Seconds between looks while an object waits to be acknowledged (at first, and when it waits for long), and otherwise.
_WAITING = 0.2
_WAITING_LONG = 1.0
_IDLE = 10.0


class View(Protocol):
    """What the controller knows."""

    @property
    def findings(self) -> Sequence[Finding]: ...

    @property
    def refused(self) -> Mapping[Key, Object]:
        """Objects as written that are not in force so."""
        ...


class Keeper:
    """``expected``: our processes that should be connected to some controller."""

    def __init__(
        self,
        view: View,
        clients: Clients,
        programming: Programming,
        expected: Callable[[], Iterable[Member]] = tuple,
    ) -> None:
        self._view = view
        self._clients = clients
        self._programming = programming
        self._expected = expected
        self._board = Board(programming)
        self._published = asyncio.Event()
        self._readers: set[asyncio.Event] = set()
        #: Asks the other controllers about objects by id; set where there are others.
        self.ask: Callable[[Iterable[str]], Awaitable[Sequence[Replica]]] | None = None

    @property
    def verdicts(self) -> Mapping[Key, Verdict]:
        return self._board.verdicts

    def published(self) -> None:
        """A snapshot was published, or what there is to say about objects is different."""
        self._published.set()

    def subscribe(self) -> asyncio.Event:
        """An event that is set whenever verdicts have changed."""
        event = asyncio.Event()
        event.set()
        self._readers.add(event)
        return event

    def unsubscribe(self, event: asyncio.Event) -> None:
        self._readers.discard(event)

    async def run(self) -> None:
        """Runs until cancelled."""
        wait = _WAITING
        while True:
            self._published.clear()
            waiting = await self._judge()
            try:
                async with asyncio.timeout(wait if waiting else _IDLE):
                    await self._published.wait()
                # Who has just been sent something needs a moment, and changes come in swarms.
                await asyncio.sleep(_WAITING / 2)
                wait = _WAITING
            except TimeoutError:
                wait = min(wait * 1.1, _WAITING_LONG)

    async def _judge(self) -> bool:
        """Judge; True if an object waits for somebody."""
        ids = self._board.unsettled()
        replicas = await self.ask(ids) if ids and self.ask is not None else ()
        before = self._board.verdicts
        waiting = self._board.judge(
            self._view.findings,
            self._view.refused,
            holding(self._clients, self._programming),
            self._expected() if ids else (),
            replicas,
        )
        if before != self._board.verdicts:
            for event in self._readers:
                event.set()
        return waiting


def page(verdicts: Mapping[Key, Verdict]) -> list[dict[str, object]]:
    """``/debug/status``: every policy object, those that need somebody first."""
    order = list(Outcome)
    shown = sorted(verdicts.values(), key=lambda v: (order.index(v.outcome), v.key))
    return [
        {
            "apiVersion": v.api_version,
            "kind": v.key.kind,
            "namespace": v.key.namespace,
            "name": v.key.name,
            "uid": v.id,
            "generation": v.generation,
            "state": v.outcome.value,
            "reason": v.reason,
            "message": v.message,
            "waiting": v.waiting,
        }
        for v in shown
    ]
