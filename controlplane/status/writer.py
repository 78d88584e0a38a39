"""Tells the cluster the verdicts: ``.status`` where a kind has one, else an Event. Runs on the leader only.

Owns how often: nothing is written that is there already, an object that is about to be acknowledged is given a moment, and writes
have a rate. A write names the version that it is based on, so what others write meanwhile stays; it is then tried again. What a
leader before this one has written is read from the objects, so a change of leaders writes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter

from common import logs
from common.kubernetes import ApiError, Client, Unreachable, path_of
from controlplane.source import Key
from controlplane.status.board import Outcome, Verdict
from controlplane.status.conditions import OwnGateway, OwnParent, said_programmed, status_of
from controlplane.status.keeper import Keeper
from controlplane.status.kinds import CONTROLLER

_log = logs.get(__name__)
_MANAGER = "mycel-controlplane"
#: Seconds that an object is given to be acknowledged before it is said that it waits; between saying so again.
_PATIENCE = 1.0
_SAY_AGAIN = 10.0
#: Seconds until a write that failed is tried again, and one that was refused for good.
_AGAIN = 1.0
_REFUSED_AGAIN = 60.0
#: Seconds that what a group offers is remembered.
_DISCOVERY = 60.0
#: Writes a second, and how many may come at once.
_RATE = 20.0
_BURST = 40.0
_AT_ONCE = 4
#: Objects that are looked at until it is asked again what is due: a second's worth, since a new leader looks at all there are.
_BATCH = 20


@dataclass(frozen=True, slots=True)
class _Resource:
    plural: str
    namespaced: bool
    status: bool


@dataclass(slots=True)
class _Said:
    """What was said about an object last, or tried: and when it may be tried again."""

    verdict: Verdict | None = None
    since: float = 0.0  #: when the verdict of now was seen first
    seen: Verdict | None = None
    said_at: float = 0.0
    believed: str = ""  #: digest of the content of which the status says, or once said, that it is programmed
    not_before: float = 0.0


class StatusWriter:
    """Call :meth:`run` for as long as this controller leads."""

    def __init__(
        self,
        client: Client,
        keeper: Keeper,
        replica: str,
        own_parent: OwnParent,
        own_gateway: OwnGateway,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._keeper = keeper
        self._replica = replica
        self._own_parent = own_parent
        self._own_gateway = own_gateway
        self._clock = clock
        self._writes = Counter(
            "mycel_controlplane_status_writes",
            "Statuses and Events written.",
            ["kind", "outcome"],
            registry=registry,
        )
        self._failures = Counter(
            "mycel_controlplane_status_failures",
            "Statuses and Events that could not be written.",
            registry=registry,
        )
        self._said: dict[str, _Said] = {}
        self._resources: dict[str, tuple[float, dict[str, _Resource]]] = {}
        self._discovering = asyncio.Lock()
        self._tokens, self._tokens_at = _BURST, 0.0
        self._complained: dict[tuple[str, str], str] = {}

    async def run(self) -> None:
        """Write until cancelled."""
        self._said.clear()
        changed = self._keeper.subscribe()
        slots = asyncio.Semaphore(_AT_ONCE)

        async def write(verdict: Verdict, said: _Said) -> None:
            async with slots:
                await self._take_token()
                await self._write(verdict, said)

        try:
            while True:
                changed.clear()
                due, wait = self._due(self._keeper.verdicts)
                async with asyncio.TaskGroup() as group:
                    for verdict, said in due[:_BATCH]:
                        group.create_task(write(verdict, said), name="status")
                try:
                    async with asyncio.timeout(0 if due else wait):
                        await changed.wait()
                except TimeoutError:
                    pass
        finally:
            self._keeper.unsubscribe(changed)

    def _due(self, verdicts: Mapping[Key, Verdict]) -> tuple[list[tuple[Verdict, _Said]], float | None]:
        """What has to be written now, the latest first, and seconds until something else has to be (None: nothing waits)."""
        now = self._clock()
        due = []
        next_at = float("inf")
        said_of = {v.id: self._said.get(v.id) or _Said() for v in verdicts.values()}
        self._said = said_of
        for verdict in verdicts.values():
            said = said_of[verdict.id]
            if said.seen is None or not _alike(said.seen, verdict):
                said.since = now
            said.seen = verdict
            if said.verdict == verdict:
                continue
            at = said.not_before
            if verdict.outcome is Outcome.ACCEPTED:
                at = max(at, said.since + _PATIENCE)
                if said.verdict is not None and _alike(said.verdict, verdict):
                    at = max(at, said.said_at + _SAY_AGAIN)
            if at <= now:
                due.append((verdict, said))
            else:
                next_at = min(next_at, at)
        due.sort(key=lambda item: item[1].since, reverse=True)
        return due, None if next_at == float("inf") else max(next_at - now, 0.01)

    async def _write(self, verdict: Verdict, said: _Said) -> None:
        name = f"{verdict.key.kind}.{verdict.key.group}"
        now = self._clock()
        try:
            resource = await self._resource(verdict)
            if resource is None:
                done = True  # its CRD is gone, and the object with it
            elif resource.status:
                done = await self._put_status(verdict, resource, said)
            else:
                done = await self._put_event(verdict)
        except (ApiError, Unreachable) as e:
            self._failures.inc()
            for_good = isinstance(e, ApiError) and e.status in (400, 403, 405, 422)
            said.not_before = now + (_REFUSED_AGAIN if for_good else _AGAIN)
            reason = e.reason if isinstance(e, ApiError) else "Unreachable"
            if self._complained.get((name, reason)) != str(e):
                _log.warning("status cannot be written", object=str(verdict.key), kind=name, error=str(e))
            self._complained[name, reason] = str(e)
            return
        if done:
            said.verdict, said.said_at, said.not_before = verdict, now, 0.0
        else:
            said.not_before = now + _AGAIN / 2

    async def _put_status(self, verdict: Verdict, resource: _Resource, said: _Said) -> bool:
        """True if the status says it; False if it has to be tried again."""
        key = verdict.key
        path = path_of(verdict.api_version, resource.plural, key.namespace, key.name)
        try:
            there = await self._client.get(path)
        except ApiError as e:
            if e.status == 404:
                return True
            raise
        metadata = there["metadata"]
        if metadata["uid"] != verdict.id:
            return True  # another one by the same name: it will have a verdict of its own
        if verdict.generation is not None and metadata.get("generation") != verdict.generation:
            return False  # written meanwhile; judged in a moment
        if verdict.outcome is Outcome.PROGRAMMED:
            said.believed = verdict.digest
        elif verdict.outcome is Outcome.ACCEPTED and said_programmed(there):
            # A leader before this one has seen it acknowledged by all; nothing is told from not having seen it here. Not so
            # where an annotation has changed since, which is no new generation.
            said.believed = said.believed or verdict.digest
            if said.believed == verdict.digest:
                return True
        changes = status_of(there, verdict, _now(), self._own_parent, self._own_gateway)
        if changes is None:
            return True
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": changes}
        try:
            await self._client.patch(f"{path}/status", body, fieldManager=_MANAGER)
        except ApiError as e:
            if e.status == 409:
                return False
            if e.status == 404:
                return True
            raise
        self._writes.labels("status", verdict.outcome.value).inc()
        _log.debug("status written", object=str(key), outcome=verdict.outcome.value)
        return True

    async def _put_event(self, verdict: Verdict) -> bool:
        key = verdict.key
        reason, note = {
            Outcome.REFUSED: ("Refused", verdict.message),
            Outcome.NOT_COMPILED: ("NotCompiled", verdict.message),
            Outcome.ACCEPTED: ("Accepted", f"accepted; waiting for {verdict.waiting}"),
            Outcome.PROGRAMMED: ("Programmed", verdict.message or "acknowledged by every node"),
        }[verdict.outcome]
        bad = verdict.outcome in (Outcome.REFUSED, Outcome.NOT_COMPILED) or bool(verdict.message)
        # The name follows from what is said: saying it twice, by this controller or the next, is one Event.
        said = (verdict.id, str(verdict.generation), verdict.digest, reason, verdict.message)
        digest = hashlib.sha256("\0".join(said).encode()).hexdigest()[:16]
        namespace = key.namespace or "default"
        event = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{key.name[:200]}.{digest}", "namespace": namespace},
            "eventTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "type": "Warning" if bad else "Normal",
            "reason": reason,
            "action": "Compile",
            "note": note[:1024],
            "reportingController": CONTROLLER,
            "reportingInstance": self._replica[:128],
            "regarding": {
                "apiVersion": verdict.api_version,
                "kind": key.kind,
                "name": key.name,
                "namespace": key.namespace,
                "uid": verdict.id,
            },
        }
        try:
            await self._client.create(
                path_of("events.k8s.io/v1", "events", namespace), event, fieldManager=_MANAGER
            )
        except ApiError as e:
            if e.reason == "AlreadyExists" or e.status == 404:
                return True
            raise
        self._writes.labels("event", verdict.outcome.value).inc()
        return True

    async def _resource(self, verdict: Verdict) -> _Resource | None:
        """What the API server offers of a kind; None if it does not have it (any more)."""
        version = verdict.api_version
        async with self._discovering:
            known = self._resources.get(version)
            if known is None or self._clock() >= known[0] + _DISCOVERY:
                known = self._resources[version] = self._clock(), await self._discover(version)
        return known[1].get(verdict.key.kind)

    async def _discover(self, version: str) -> dict[str, _Resource]:
        try:
            answer = await self._client.get(f"/apis/{version}")
        except ApiError as e:
            if e.status == 404:
                return {}
            raise
        offered = answer.get("resources") or ()
        names = {r["name"] for r in offered}
        return {
            r["kind"]: _Resource(r["name"], bool(r.get("namespaced")), f"{r['name']}/status" in names)
            for r in offered
            if "/" not in r["name"]
        }

    async def _take_token(self) -> None:
        while True:
            now = self._clock()
            self._tokens = min(_BURST, self._tokens + (now - self._tokens_at) * _RATE)
            self._tokens_at = now
            if self._tokens >= 1:
                self._tokens -= 1
                return
            await asyncio.sleep((1 - self._tokens) / _RATE)


def _alike(one: Verdict, other: Verdict) -> bool:
    """True if they differ at most in for whom the object waits."""
    return (one.id, one.generation, one.digest, one.outcome) == (
        other.id,
        other.generation,
        other.digest,
        other.outcome,
    )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
