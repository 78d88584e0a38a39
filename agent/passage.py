"""How a pod that runs already comes into the mesh, and how one leaves that goes on to run.

Owns the stages, their order and how long each lasts; a table, without I/O. Nothing that is open is touched at any of them:

* PREPARED: the proxies may have listeners in the pod's namespace and deliver to it; its applications dial as without a mesh, and
  what arrives in plain text is not judged.
* CAPTURED: what its applications dial from now on goes through the mesh; what arrives in plain text is still not judged, since
  those who dial it may learn of the change a moment later than this node.
* ENROLLED: as every pod that came by CNI ADD, which begins here.

A pod that leaves goes the same way back, and has left the kernel at its end. Other nodes dial it by the mesh for
:data:`agent.api.LINGER` more. So a node may hear of it that much before the pod's own, which judges plain text until it has
heard; and what remains of SETTLE and LAST_CALL after it, when nobody listens there for the mesh any more.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from typing import NamedTuple

#: Seconds as CAPTURED: until every node's agent and proxies have had the same update, and a SYN of before was repeated.
SETTLE = 3.0
#: Seconds as PREPARED on the way out: until what was captured last has been accepted.
LAST_CALL = 0.5
#: Seconds that another node may need until it has captured a pod that joins: its plain text is plain text until then.
GRACE = 30.0
#: Seconds between looks whether the proxies have their listeners: at first, and at most. A look is a whole pass, and there may be
#: no proxy for long.
POLL = 0.1
POLL_MOST = 2.0


class Stage(enum.IntEnum):
    """See the module."""

    PREPARED = 1
    CAPTURED = 2
    ENROLLED = 3


class _At(NamedTuple):
    stage: Stage
    since: float
    leaving: bool = False
    lasts: float = 0.0  #: seconds that one that leaves stays there


class Passages:
    """The stages of this node's pods, by netns cookie. Every method has the time of now, in seconds of any clock.

    One that turns round on its way has all of the time of the stage that it is in before it: other nodes may just have heard
    that it went the other way.
    """

    def __init__(self) -> None:
        self._places: dict[int, _At] = {}

    def adopt(self, cookie: int, stage: Stage, now: float) -> None:
        """A pod that a predecessor programmed."""
        self._places[cookie] = _At(stage, now)

    def stage(self, cookie: int) -> Stage | None:
        found = self._places.get(cookie)
        return None if found is None else found.stage

    def join(self, cookie: int, *, running: bool, reachable: bool, now: float) -> Stage:
        """The stage of a pod that is to be in the mesh, from now on.

        :param running: its processes were there before; a pod of an ADD has none yet.
        :param reachable: the proxies have the listeners that its connections need.
        """
        at = self._places.get(cookie)
        match at:
            case None:
                at = _At(Stage.PREPARED if running else Stage.ENROLLED, now)
            case _At(leaving=True):
                at = _At(at.stage, now)
            case _At(Stage.PREPARED) if reachable:
                at = _At(Stage.CAPTURED, now)
            case _At(Stage.CAPTURED) if now - at.since >= SETTLE:
                at = _At(Stage.ENROLLED, now)
        self._places[cookie] = at
        return at.stage

    def leave(self, cookie: int, now: float) -> Stage | None:
        """The stage of a pod that is to leave and lives on; None when it has left."""
        at = self._places.get(cookie)
        if at is None:
            return None
        if not at.leaving:
            at = _At(min(at.stage, Stage.CAPTURED), now, leaving=True, lasts=SETTLE)
        elif now - at.since >= at.lasts:
            if at.stage is Stage.PREPARED:
                del self._places[cookie]
                return None
            at = _At(Stage.PREPARED, now, leaving=True, lasts=LAST_CALL)
        self._places[cookie] = at
        return at.stage

    def keep(self, cookies: Collection[int]) -> None:
        """Forget all others: they have ended."""
        for cookie in self._places.keys() - set(cookies):
            del self._places[cookie]

    def next(self, cookies: Collection[int], now: float) -> float | None:
        """Seconds until one of these is to be asked about again; None when all are where they are to be."""
        waits = []
        for cookie in cookies:
            match self._places.get(cookie):
                case _At(since=since, leaving=True, lasts=lasts):
                    waits.append(lasts - (now - since))
                case _At(Stage.PREPARED, since):
                    waits.append(min(max(POLL, (now - since) / 8), POLL_MOST))
                case _At(Stage.CAPTURED, since):
                    waits.append(SETTLE - (now - since))
        return max(0.0, min(waits)) if waits else None
