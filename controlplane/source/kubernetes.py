"""The Kubernetes API as the source: every kind that a mesh reads and the cluster has, followed by itself.

Owns which kinds are followed (those of Kubernetes; those whose CustomResourceDefinition is there, as they come and go; Secrets
and ConfigMaps that some object refers to), when a state is handed out, and what is kept on disk. The rules of the last good
state:

- an object that its schema refuses keeps its last good version, or is absent if there was none;
- a kind that cannot be read (forbidden, unreachable, its conversion webhook broken) keeps all it had, and holds up no other;
- nothing is handed out before every kind was read, or refused for half a minute (unreachable is not refused): half of a
  configuration could be one without its policies. Until then, what the last run left on disk is in force.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, Metric

from common import logs
from common.kubernetes import ApiError, Client, Unreachable, path_of
from common.tasks import Tasks
from controlplane.source.collection import Collection, Table
from controlplane.source.definitions import Definitions
from controlplane.source.follower import Follower
from controlplane.source.kinds import BUILT_IN, CUSTOM, REFERRED, Kind
from controlplane.source.lastgood import LastGood
from controlplane.source.objects import Fault, Key, Object, State, Validator
from controlplane.source.references import references

_log = logs.get(__name__)
#: Seconds from a change until it is handed out: what comes together is one state.
_COALESCE = 0.005
#: Seconds from a change until the objects are written to disk.
_SAVE = 10.0
#: Seconds for which the server has to refuse a kind until a state is handed out without it. One that has just started refuses
#: what it allows later: it has yet to read its own roles, or to fill its caches.
_PATIENCE = 30.0
#: Secrets and ConfigMaps followed at once: each costs a connection.
_MAX_REFERRED = 256


@dataclass(frozen=True)
class _Followed:
    follower: Follower
    collection: Collection
    task: asyncio.Task[None]
    name: str  #: as people call it
    version: str


class KubernetesSource:
    """The source over an API server. ``client`` is open while :meth:`changes` is followed. One task owns it."""

    def __init__(
        self,
        client: Client,
        validate: Validator,
        last_good: LastGood | None = None,
        registry: CollectorRegistry | None = None,
        patience: float = _PATIENCE,
    ) -> None:
        self._client = client
        self._patience = patience
        self._store = last_good
        self._table = Table(validate, self._dirty)
        self._wake = asyncio.Event()
        self._tasks = Tasks()
        self._kinds: dict[Kind, _Followed] = {}
        self._referred: dict[Key, _Followed] = {}
        self._referrers: dict[Key, frozenset[Key]] = {}  #: by the object that refers
        self._definitions = Definitions(client, self._tasks, self._served, self._touch, patience)
        self._other = False  #: objects are not those of the last state any more
        self._unsaved = False
        self._strays: set[Key] = set()  #: pods that came before their namespace
        self._refused_references: frozenset[Key] = frozenset()
        self.synced = False  #: a state of the API server's was handed out, not only that of the disk
        self._had_last_good = False
        if registry is not None:
            self._metrics(registry)

    @property
    def ready(self) -> bool:
        """True once there is a configuration to serve: the cluster's, or that of the last run."""
        return self.synced or self._had_last_good

    @property
    def lists(self) -> int:
        """Whole lists that were asked for so far, of all kinds."""
        return sum(f.follower.lists for f in self._kinds.values())

    def load(self) -> State:
        """What the last run left on disk; empty if there is nothing. No request is made."""
        if self._store:
            for key, found in self._store.load().items():
                self._table.objects[key] = found
                self._note_references(key)
        self._had_last_good = bool(self._table.objects)
        return self._state()

    async def changes(self) -> AsyncGenerator[State, None]:
        """The cluster's state once it was read whole, then a state a few milliseconds after each change."""
        faults: tuple[Fault, ...] = ()
        try:
            for kind in BUILT_IN:
                self._follow(kind, kind.version)
            self._definitions.start()
            self._follow_references()
            if self._store:
                self._tasks.start(self._save_now_and_then(self._store), name="last good state")
            while True:
                await self._wake.wait()
                await asyncio.sleep(_COALESCE)
                self._wake.clear()
                self._follow_references()
                if not self.synced:
                    if not self._settled():
                        continue
                    self.synced = True
                    _log.info("configuration was read", objects=len(self._table.objects))
                    self._other = True
                state = self._state()
                if self._other or state.faults != faults:
                    self._unsaved, self._other, faults = True, False, state.faults
                    yield state
        finally:
            await self._tasks.cancel()
            self._kinds.clear()
            self._referred.clear()
            if self._store and self._unsaved:
                self._unsaved = False
                self._store.save(self._table.objects)

    def _state(self) -> State:
        objects = dict(self._table.objects)
        self._strays = {key for key in self._strays if key in objects and _is_stray(key, objects)}
        for key in self._strays:
            del objects[key]
        return State(objects, tuple(sorted(self._all_faults())), dict(self._table.refused))

    def _dirty(self, key: Key) -> None:
        if _is_stray(key, self._table.objects):
            self._strays.add(key)
        self._note_references(key)
        self._other = True
        self._wake.set()

    def _touch(self) -> None:
        self._wake.set()

    def _settled(self) -> bool:
        followed = (*self._kinds.values(), *self._referred.values())
        return self._definitions.settled and all(f.follower.settled for f in followed)

    def _follow(self, kind: Kind, version: str, before: Sequence[Key] | None = None) -> None:
        if before is None:
            before = self._table.of({(kind.group, kind.kind)})
        collection = Collection(self._table, kind, version, before)
        path = path_of(f"{kind.group}/{version}" if kind.group else version, kind.plural)
        self._kinds[kind] = self._start(path, collection, str(kind), version, self._patience)

    def _start(
        self,
        path: str,
        collection: Collection,
        name: str,
        version: str,
        patience: float = 0.0,
        **params: Any,
    ) -> _Followed:
        follower = Follower(self._client, path, collection, self._touch, params, patience=patience)
        return _Followed(follower, collection, self._tasks.start(follower.run(), name=name), name, version)

    def _served(self, versions: Mapping[Kind, str]) -> None:
        """Which custom kinds there are now, each with the version to read it in."""
        absent: set[tuple[str, str]] = set()
        for kind in CUSTOM:
            version, followed = versions.get(kind, ""), self._kinds.get(kind)
            if followed is not None and followed.version == version:
                continue
            if followed is not None:
                followed.task.cancel()
                del self._kinds[kind]
            if version:
                _log.info("kind is there", kind=str(kind), version=version)
                # Read in another version it is the same objects: they stay until the new list is whole.
                self._follow(kind, version, followed.collection.keys if followed else None)
            else:
                if followed is not None:
                    _log.info("kind is gone", kind=str(kind))
                absent.add((kind.group, kind.kind))
        for key in self._table.of(absent):
            self._table.remove(key)
        self._touch()

    def _note_references(self, key: Key) -> None:
        found = self._table.objects.get(key)
        named = references(found) if found else frozenset()
        if named:
            self._referrers[key] = named
        else:
            self._referrers.pop(key, None)

    def _follow_references(self) -> None:
        wanted = {key for named in self._referrers.values() for key in named}
        for key in [k for k in self._referred if k not in wanted]:
            followed = self._referred.pop(key)
            followed.task.cancel()
            followed.collection.clear()
        missing = sorted(wanted - self._referred.keys())
        room = _MAX_REFERRED - len(self._referred)
        for key in missing[:room]:
            kind = REFERRED[key.kind]
            collection = Collection(
                self._table, kind, kind.version, [key] if key in self._table.objects else []
            )
            path = path_of(kind.version, kind.plural, key.namespace)
            self._referred[key] = self._start(
                path, collection, str(key), kind.version, fieldSelector=f"metadata.name={key.name}"
            )
        self._refused_references = frozenset(missing[room:])
        if not self.synced and self._settled():
            # Of the last run, and nobody refers to it any more.
            for key in [k for k in self._table.objects if k.kind in REFERRED and not k.group]:
                if key not in wanted:
                    del self._table.objects[key]

    def _all_faults(self) -> list[Fault]:
        faults = [f for faults in self._table.faults.values() for f in faults]
        followed = [(f.name, f.follower.problem) for f in self._kinds.values()]
        followed += [("customresourcedefinitions", self._definitions.problem)]
        unreachable = [p for _, p in followed if isinstance(p, Unreachable)]
        if unreachable:
            action = "configuration stays as it is until the API server answers"
            faults.append(
                Fault("", "", "", f"the API server cannot be reached: {_least(unreachable)}", action)
            )
        for name, problem in followed:
            if isinstance(problem, ApiError):
                faults.append(Fault("", "", "", f"{name} cannot be read: {problem}", _action(problem)))
        for key, f in self._referred.items():
            if isinstance(f.follower.problem, ApiError):
                problem = f.follower.problem
                faults.append(Fault("", str(key), "", f"cannot be read: {problem}", _action(problem)))
        for key in self._refused_references:
            reason = f"not read: objects refer to more than {_MAX_REFERRED} Secrets and ConfigMaps"
            faults.append(Fault("", str(key), "", reason, "refer to fewer"))
        return faults

    async def _save_now_and_then(self, store: LastGood) -> None:
        while True:
            await asyncio.sleep(_SAVE)
            if self._unsaved:
                self._unsaved = False
                await asyncio.to_thread(store.save, dict(self._table.objects))

    def _metrics(self, registry: CollectorRegistry) -> None:
        synced = Gauge(
            "mycel_controlplane_source_synced",
            "1 once the cluster's configuration was read whole.",
            registry=registry,
        )
        synced.set_function(lambda: float(self.synced))
        problems = Gauge(
            "mycel_controlplane_source_problems",
            "Collections of the API server that cannot be followed at the moment.",
            registry=registry,
        )
        problems.set_function(
            lambda: float(sum(f.follower.problem is not None for f in tuple(self._kinds.values())))
        )
        registry.register(_Counts(self._kinds))


class _Counts:
    """Counters that followers have already."""

    def __init__(self, kinds: Mapping[Kind, _Followed]) -> None:
        self._kinds = kinds

    def collect(self) -> list[Metric]:
        lists = CounterMetricFamily(
            "mycel_controlplane_source_lists", "Whole lists asked for, by kind.", labels=["kind"]
        )
        failures = CounterMetricFamily(
            "mycel_controlplane_source_failures", "Lists and watches that failed, by kind.", labels=["kind"]
        )
        for kind, followed in sorted(self._kinds.items()):
            lists.add_metric([str(kind)], followed.follower.lists)
            failures.add_metric([str(kind)], followed.follower.failures)
        return [lists, failures]


def _least(problems: Sequence[Exception]) -> str:
    """One text for what all of them say, the same whichever failed last."""
    return min(str(p).partition(": ")[2] or str(p) for p in problems)


def _action(problem: ApiError) -> str:
    if problem.status == 403:
        return "give the controller's service account get, list and watch on it; what was known of it stays"
    return "what was known of it stays"


def _is_stray(key: Key, objects: Mapping[Key, Object]) -> bool:
    """Whether this is a pod of which nobody can say yet if it is in the mesh: the watch of namespaces is behind.

    Handed out it would be outside, and speak in plain text until its namespace is known. Unknown, it waits.
    """
    if key.kind != "Pod" or key.group or Key("", "Namespace", "", key.namespace) in objects:
        return False
    # Every cluster has this one; where not even that may be read, there is nothing to wait for.
    return Key("", "Namespace", "", "default") in objects
