"""How a pod that runs already comes into the mesh, and how one leaves that goes on to run.

Owns the stages, their order and how long each lasts; a table, without I/O. Nothing that is open is touched at any of them:

* PREPARED: the proxies may have listeners in the pod's namespace and deliver to it; its applications dial as without a mesh, and
  what arrives in plain text is not judged.
* CAPTURED: what its applications dial from now on goes through the mesh; what arrives in plain text is still not judged, since
  those who dial it may learn of the change a moment later than this node.
* ENROLLED: as every pod that came by CNI ADD, which begins here.

A pod that leaves goes the same way back, and has left the kernel at its end. Other nodes dial it by the mesh for
:data:`agent.api.LINGER` more, half of SETTLE: so a node may hear of it that much before the pod's own, which judges
plain text until then, and as much after it.
"""

from __future__ import annotations

import enum
from collections.abc import Collection

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


class Passages:
    """The stages of this node's pods, by netns cookie. Every method has the time of now, in seconds of any clock."""

    def __init__(self) -> None:
        self._stages: dict[int, tuple[Stage, float]] = {}

    def adopt(self, cookie: int, stage: Stage, now: float) -> None:
        """A pod that a predecessor programmed."""
        self._stages[cookie] = (stage, now)

    def stage(self, cookie: int) -> Stage | None:
        found = self._stages.get(cookie)
        return None if found is None else found[0]

    def join(self, cookie: int, *, running: bool, reachable: bool, now: float) -> Stage:
        """The stage of a pod that is to be in the mesh, from now on.

        :param running: its processes were there before; a pod of an ADD has none yet.
        :param reachable: the proxies have the listeners that its connections need.
        """
        stage, since = self._stages.get(cookie, (None, now))
        match stage:
            case None:
                stage = Stage.PREPARED if running else Stage.ENROLLED
            case Stage.PREPARED if reachable:
                stage = Stage.CAPTURED
            case Stage.CAPTURED if now - since >= SETTLE:
                stage = Stage.ENROLLED
        return self._enter(cookie, stage, now)

    def leave(self, cookie: int, now: float) -> Stage | None:
        """The stage of a pod that is to leave and lives on; None when it has left."""
        stage, since = self._stages.get(cookie, (None, now))
        match stage:
            case None:
                return None
            case Stage.ENROLLED:
                stage = Stage.CAPTURED
            case Stage.CAPTURED if now - since >= SETTLE:
                stage = Stage.PREPARED
            case Stage.PREPARED if now - since >= LAST_CALL:
                del self._stages[cookie]
                return None
        return self._enter(cookie, stage, now)

    def keep(self, cookies: Collection[int]) -> None:
        """Forget all others: they have ended."""
        for cookie in self._stages.keys() - set(cookies):
            del self._stages[cookie]

    def next(self, *, leaving: Collection[int], now: float) -> float | None:
        """Seconds until one is to be asked about again; None when all are where they are to be."""
        waits = []
        for cookie, (stage, since) in self._stages.items():
            if cookie in leaving:
                waits.append(
                    {Stage.PREPARED: LAST_CALL, Stage.CAPTURED: SETTLE}.get(stage, 0.0) - (now - since)
                )
            elif stage is Stage.PREPARED:
                waits.append(min(max(POLL, (now - since) / 8), POLL_MOST))
            elif stage is Stage.CAPTURED:
                waits.append(SETTLE - (now - since))
        return max(0.0, min(waits)) if waits else None

    def _enter(self, cookie: int, stage: Stage, now: float) -> Stage:
        known = self._stages.get(cookie)
        if known is None or known[0] is not stage:
            self._stages[cookie] = (stage, now)
        return stage
