"""The objects of a compilation as tables of input: by key, and by everything that cells look objects up by.

Owns which rows change when objects do. Indices hold what can be said of an object alone; whether a pod has ended, say, is
for cells to judge.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from controlplane.model.graph import Graph
from controlplane.model.kubernetes import SLICE_SERVICE, addresses_of, external_addresses_of
from controlplane.source import Key, Object

_NONE: frozenset[Key] = frozenset()


class _Objects:
    """Objects by key; None where there is none."""

    def __init__(self) -> None:
        self.objects: Mapping[Key, Object] = {}

    def row(self, key: Key) -> Object | None:
        return self.objects.get(key)


class _Index:
    """Sets of keys."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, set[Key]] = {}

    def row(self, key: Hashable) -> Iterable[Key]:
        return self._rows.get(key, _NONE)

    def size(self, key: Hashable) -> int:
        return len(self._rows.get(key, _NONE))

    def add(self, key: Hashable, item: Key) -> None:
        self._rows.setdefault(key, set()).add(item)

    def remove(self, key: Hashable, item: Key) -> None:
        row = self._rows[key]
        row.discard(item)
        if not row:
            del self._rows[key]


class Store:
    """All tables. Cells get at them as ``graph.settings.store``, and only through :meth:`Graph.read`."""

    def __init__(self) -> None:
        self.objects = _Objects()
        self.by_kind = _Index()  #: (group, kind)
        self.by_namespace = _Index()  #: (group, kind, namespace)
        self.pods_by_uid = _Index()
        self.pods_by_label = _Index()  #: (namespace, name, value)
        self.pods_by_address = _Index()
        self.services_by_address = _Index()
        self.services_by_external_address = _Index()
        self.slices_by_service = _Index()  #: (namespace, service's name)

    def replace(self, objects: Mapping[Key, Object], graph: Graph) -> tuple[list[Key], list[Key]]:
        """Take other objects; keys that came and keys that went. Objects that are the same are told by identity first."""
        before = self.objects.objects
        came, went, changed = [], [], []
        for key, found in objects.items():
            known = before.get(key)
            if known is found:
                continue
            if known is None:
                came.append(key)
            elif known == found:
                continue
            changed.append(key)
        if len(objects) != len(before) + len(came):
            went = [key for key in before if key not in objects]
        self.objects.objects = objects
        for key in (*changed, *went):
            old, new = before.get(key), objects.get(key)
            was = set(self._entries(old)) if old else set()
            now = set(self._entries(new)) if new else set()
            for index, row in was - now:
                index.remove(row, key)
                graph.touch(index, row)
            for index, row in now - was:
                index.add(row, key)
                graph.touch(index, row)
            graph.touch(self.objects, key)
        return came, went

    def _entries(self, o: Object) -> Iterator[tuple[_Index, Hashable]]:
        group, kind, namespace, _ = o.key
        yield self.by_kind, (group, kind)
        if (group, kind) == ("", "Pod"):
            metadata = o.manifest["metadata"]
            yield self.pods_by_uid, metadata["uid"]
            for pair in o.labels.items():
                yield self.pods_by_label, (namespace, *pair)
            for address in addresses_of(o):
                yield self.pods_by_address, address
        elif (group, kind) == ("", "Service"):
            for address in addresses_of(o):
                yield self.services_by_address, address
            for address in external_addresses_of(o):
                yield self.services_by_external_address, address
        elif (group, kind) == ("discovery.k8s.io", "EndpointSlice"):
            service = o.labels.get(SLICE_SERVICE)
            if service:
                yield self.slices_by_service, (namespace, service)
        elif group:
            yield self.by_namespace, (group, kind, namespace)


def rows(table: Any, graph: Graph, key: Hashable) -> list[Object]:
    """The objects of a row of an index, the oldest first."""
    store: Store = graph.settings.store
    found = [graph.read(store.objects, k) for k in graph.read(table, key)]
    return sorted(found, key=lambda o: o.age)
