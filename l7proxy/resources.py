"""The xDS resources that this proxy has: received, converted, kept on disk, joined into a configuration.

Owns the last good version of each resource and what is still warming; knows nothing of gRPC. The controller sends changes
(:meth:`Resources.change`). What the disk keeps is the state of the world (:meth:`Resources.apply`): listeners and clusters
are the complete set, routes and endpoints replace what they name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message

from common import logs
from l7proxy import convert, convert_routes, model
from l7proxy.errors import ConversionError

_log = logs.get(__name__)

_PREFIX = "type.googleapis.com/"
LISTENER = f"{_PREFIX}envoy.config.listener.v3.Listener"
ROUTE = f"{_PREFIX}envoy.config.route.v3.RouteConfiguration"
CLUSTER = f"{_PREFIX}envoy.config.cluster.v3.Cluster"
ENDPOINT = f"{_PREFIX}envoy.config.endpoint.v3.ClusterLoadAssignment"
#: In the order in which they are asked for and read back.
TYPES = (CLUSTER, ENDPOINT, LISTENER, ROUTE)
_COMPLETE = frozenset({LISTENER, CLUSTER})

_MESSAGES: dict[str, type[Message]] = {
    LISTENER: listener_pb2.Listener,
    ROUTE: route_pb2.RouteConfiguration,
    CLUSTER: cluster_pb2.Cluster,
    ENDPOINT: endpoint_pb2.ClusterLoadAssignment,
}

#: Seconds that a new route table waits for the endpoints of its clusters before it is used anyway.
WARMING_LIMIT = 5.0


class Kept(NamedTuple):
    """The resources of a type at one moment."""

    kind: str
    version: str
    resources: tuple[any_pb2.Any, ...]


class Resources:
    def __init__(self, folder: Path | None = None, clock: Callable[[], float] = monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._raw: dict[str, dict[str, any_pb2.Any]] = {kind: {} for kind in TYPES}
        self.versions: dict[str, str] = dict.fromkeys(TYPES, "")
        self._listeners: dict[str, model.Listener] = {}
        self._routes: dict[str, model.RouteTable] = {}
        self._clusters: dict[str, model.Cluster] = {}
        self._assignments: dict[str, tuple[model.Endpoint, ...]] = {}
        self._inline: dict[str, tuple[model.Endpoint, ...]] = {}
        self._live_routes: dict[str, model.RouteTable] = {}
        self._cold_since: dict[str, float] = {}
        self.rejected: dict[tuple[str, str], str] = {}

    @property
    def warming(self) -> bool:
        """Route tables wait for endpoints: build again soon."""
        return bool(self._cold_since)

    def wanted(self, kind: str) -> list[str]:
        """Names to subscribe to; for listeners and clusters none, which means all."""
        if kind == ROUTE:
            managers = (chain.manager for listener in self._listeners.values() for chain in listener.chains)
            return sorted({manager.route_name for manager in managers if manager.inline is None})
        if kind == ENDPOINT:
            return sorted({c.eds_name for c in self._clusters.values()} - self._inline.keys())
        return []

    def held(self, kind: str) -> dict[str, str]:
        """Versions of the resources of a type that are here, by name. The controller's are so, too; else it sends them again."""
        return {name: hashlib.sha256(raw.value).hexdigest()[:16] for name, raw in self._raw[kind].items()}

    def change(
        self, kind: str, version: str, items: Iterable[any_pb2.Any], removed: Iterable[str]
    ) -> list[str]:
        """Take what has changed; as :meth:`apply` otherwise. Nothing else is forgotten: it would not be sent again."""
        for name in removed:
            self._forget(kind, name)
            self.rejected.pop((kind, name), None)
        errors, _, _ = self._convert(kind, items)
        if not errors:
            self.versions[kind] = version
        return errors

    def apply(self, kind: str, version: str, items: Iterable[any_pb2.Any]) -> list[str]:
        """Take a response. Good resources are taken over, of a bad one the last good stays; the reasons are returned."""
        errors, seen, nameless = self._convert(kind, items)
        if kind in _COMPLETE and not nameless:
            # Were one of them not readable, it could be the one that seems to be gone.
            for name in self._raw[kind].keys() - seen:
                self._forget(kind, name)
            for key in [key for key in self.rejected if key[0] == kind and key[1] not in seen]:
                del self.rejected[key]
        self._prune()
        if not errors:
            self.versions[kind] = version
        return errors

    def _convert(self, kind: str, items: Iterable[any_pb2.Any]) -> tuple[list[str], set[str], bool]:
        """Take over what is good; what is wrong, the names of all, and whether one had none."""
        errors: list[str] = []
        seen: set[str] = set()
        nameless = False
        for i, item in enumerate(items):
            name = ""
            try:
                message = _MESSAGES[kind]()
                if item.type_url != kind or not item.Unpack(message):
                    raise ConversionError(f"type_url: {item.type_url!r}, not {kind!r}")
                name = _name(message)
                if name in seen:
                    raise ConversionError("comes twice in one response")
                seen.add(name)
                self._take(kind, name, message)
            except (ConversionError, DecodeError) as error:
                nameless = nameless or not name
                errors.append(self._reject(kind, name or f"resources[{i}]", str(error)))
            except Exception as error:
                # A defect of ours in one resource: it stays as it was, and every other goes on.
                _log.exception("xDS resource not converted", error, resource=name)
                errors.append(self._reject(kind, name, f"{type(error).__name__}: {error}"))
            else:
                self.rejected.pop((kind, name), None)
                self._raw[kind][name] = item
        return errors, seen, nameless

    def _reject(self, kind: str, name: str, why: str) -> str:
        short = kind.rpartition(".")[2]
        if self.rejected.get((kind, name)) != why:
            _log.error("xDS resource rejected", resource=name, type=short, reason=why)
        self.rejected[kind, name] = why
        return f"{short} {name}: {why}"

    def _take(self, kind: str, name: str, message: Message) -> None:
        if kind == LISTENER:
            self._listeners[name] = convert.listener(message)
        elif kind == ROUTE:
            self._routes[name] = convert_routes.route_table(message)
        elif kind == ENDPOINT:
            self._assignments[name] = convert.endpoints(message)
        else:
            cluster, inline = convert.cluster(message)
            self._clusters[name] = cluster
            if inline is not None:
                self._inline[cluster.eds_name] = inline
            else:
                self._inline.pop(cluster.eds_name, None)

    def _forget(self, kind: str, name: str) -> None:
        self._raw[kind].pop(name, None)
        if kind == LISTENER:
            self._listeners.pop(name, None)
        elif kind == ROUTE:
            self._routes.pop(name, None)
            self._live_routes.pop(name, None)
            self._cold_since.pop(name, None)
        elif kind == ENDPOINT:
            self._assignments.pop(name, None)
        else:
            self._clusters.pop(name, None)
            self._inline.pop(name, None)

    def _prune(self) -> None:
        """What no listener or cluster names any more is forgotten: the server no longer speaks of it."""
        for kind in (ROUTE, ENDPOINT):
            wanted = set(self.wanted(kind))
            for name in [name for name in self._raw[kind] if name not in wanted]:
                self._forget(kind, name)
            for key in [key for key in self.rejected if key[0] == kind and key[1] not in wanted]:
                del self.rejected[key]

    def build(self) -> model.Config:
        """The configuration as of now: complete where everything arrived, the last good elsewhere."""
        assignments = {**self._assignments, **self._inline}
        routes: dict[str, model.RouteTable] = {}
        now = self._clock()
        for name, table in self._routes.items():
            live = self._live_routes.get(name)
            cold = any(
                cluster in self._clusters and self._clusters[cluster].eds_name not in assignments
                for cluster in table.clusters
            )
            if cold and live is not None and now - self._cold_since.setdefault(name, now) < WARMING_LIMIT:
                routes[name] = live
                continue
            self._cold_since.pop(name, None)
            routes[name] = self._live_routes[name] = table
        version = "/".join(self.versions[kind] for kind in TYPES)
        return model.build_config(version, self._listeners, routes, self._clusters, assignments)

    # -- disk --------------------------------------------------------------------------------------------------------

    def save(self, kind: str) -> None:
        """Keep the last good resources of a type: a restart without the controller goes on with them."""
        self.write(self.kept(kind))

    def kept(self, kind: str) -> Kept:
        """What of a type is to be kept, for :meth:`write`."""
        return Kept(kind, self.versions[kind], tuple(self._raw[kind].values()))

    def write(self, kept: Kept) -> None:
        """:meth:`save` in two: this part may run in a thread."""
        if self._folder is None:
            return
        kind = kept.kind
        response = discovery_pb2.DiscoveryResponse(type_url=kind, version_info=kept.version)
        response.resources.extend(kept.resources)
        path = self._path(kind)
        # A name of its own: a predecessor may write at the same moment (and has the same process id, in its container).
        temporary = path.with_suffix(f".{os.urandom(6).hex()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(response.SerializeToString())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            _log.error("configuration not kept on disk", file=str(path), reason=str(error))

    def load(self) -> bool:
        """Read back what :meth:`save` kept; False if there is nothing usable."""
        if self._folder is None:
            return False
        found = False
        # Endpoints and routes are wanted only once clusters and listeners are known: TYPES is in that order.
        for kind in TYPES:
            path = self._path(kind)
            try:
                response = discovery_pb2.DiscoveryResponse.FromString(path.read_bytes())
            except FileNotFoundError:
                continue
            except (OSError, DecodeError) as error:
                _log.error("kept configuration not readable", file=str(path), reason=str(error))
                continue
            self.apply(kind, response.version_info, response.resources)
            found = True
        return found

    def _path(self, kind: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{kind.rpartition('.')[2]}.pb"


def _name(message: Message) -> str:
    return str(getattr(message, "cluster_name", "") or getattr(message, "name", ""))
