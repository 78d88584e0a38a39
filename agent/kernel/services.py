"""The tables ``services``, ``backends`` and ``members``.

Owns the swap: new backends are written under a new generation, then the service names that generation, then the old ones
go. A program that read the service just before asks again when its backend is gone. Who had which backend last (``affinity``)
is the programs' own: what it says counts only while the backend is a member of the generation in force.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from agent.kernel.model import Backend, Service
from bpf import wire
from bpf.maps import Map

_U32 = 0xFFFFFFFF


class Services:
    """The tables, and what is in them."""

    def __init__(self, services: Map, backends: Map, members: Map) -> None:
        """Takes over what a predecessor left, also what it left half done."""
        self._services = services
        self._backends = backends
        self._members = members
        self._known: dict[wire.Endpoint, tuple[wire.Service, tuple[Backend, ...]]] = {}
        by_key = {wire.BackendKey.unpack(key): wire.Endpoint.unpack(value) for key, value in backends.items()}
        for key, value in services.items():
            service = wire.Service.unpack(value)
            found: list[Backend] = []
            for slot in range(service.count):
                endpoint = by_key.pop(wire.BackendKey(service.id, service.generation, slot), None)
                if endpoint is not None:
                    found.append(Backend(endpoint.address, endpoint.port))
            self._known[wire.Endpoint.unpack(key)] = service, tuple(found)
        for orphan in by_key:
            backends.delete(orphan.pack())
        current = {(service.id, service.generation) for service, _ in self._known.values()}
        for data, _ in members.items():
            member = wire.MemberKey.unpack(data)
            if (member.service, member.generation) not in current:
                members.delete(data)
        self._next = max((service.id for service, _ in self._known.values()), default=0) + 1

    def set(self, key: wire.Endpoint, backends: Iterable[Backend], *, l7: bool, affinity: int) -> None:
        """What was there before still is when it raises.

        :param affinity: seconds for which a client keeps its backend after it dialled last; 0 is not at all.
        :raises MapFullError: no room.
        :raises ValueError: a backend is no IP address with a port, or ``affinity`` no number of seconds.
        """
        wanted = tuple(backends)
        if not 0 <= affinity <= _U32 >> wire.SERVICE_AFFINITY_SHIFT:
            raise ValueError(f"session affinity of {affinity} s")
        for backend in wanted:
            wire.Endpoint(backend.address, backend.port).pack()
        flags = wire.SERVICE_L7 if l7 else 0
        if affinity:
            flags |= wire.SERVICE_AFFINITY | affinity << wire.SERVICE_AFFINITY_SHIFT
        known = self._known.get(key)
        if known is not None:
            old, had = known
            if had == wanted and old.flags == flags and old.count == len(wanted):
                return
            new = wire.Service(old.id, (old.generation + 1) & _U32, len(wanted), flags)
        else:
            old, had = None, ()
            new = wire.Service(self._next, 0, len(wanted), flags)
            self._next = (self._next + 1) & _U32
        try:
            for slot, backend in enumerate(wanted):
                endpoint = wire.Endpoint(backend.address, backend.port).pack()
                self._backends.update(wire.BackendKey(new.id, new.generation, slot).pack(), endpoint)
                if affinity:
                    self._members.update(_member(new, backend), struct.pack("=I", slot))
            self._services.update(key.pack(), new.pack())
        except OSError:
            self._delete_backends(new, wanted)
            raise
        self._known[key] = new, wanted
        if old is not None:
            self._delete_backends(old, had)

    def remove(self, key: wire.Endpoint) -> None:
        known = self._known.pop(key, None)
        self._services.delete(key.pack())
        if known is not None:
            self._delete_backends(*known)

    def _delete_backends(self, service: wire.Service, backends: Iterable[Backend]) -> None:
        for slot in range(service.count):
            self._backends.delete(wire.BackendKey(service.id, service.generation, slot).pack())
        if service.flags & wire.SERVICE_AFFINITY:
            for backend in backends:
                self._members.delete(_member(service, backend))

    def all(self) -> dict[tuple[str, int], Service]:
        return {
            (key.address, key.port): Service(
                bool(service.flags & wire.SERVICE_L7),
                backends,
                service.flags >> wire.SERVICE_AFFINITY_SHIFT if service.flags & wire.SERVICE_AFFINITY else 0,
            )
            for key, (service, backends) in self._known.items()
        }


def _member(service: wire.Service, backend: Backend) -> bytes:
    return wire.MemberKey(service.id, service.generation, backend.address, backend.port).pack()
