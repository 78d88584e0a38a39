"""The tables ``services`` and ``backends``.

Owns the swap: new backends are written under a new generation, then the service names that generation, then the old ones
go. A program that read the service just before asks again when its backend is gone.
"""

from __future__ import annotations

from collections.abc import Iterable

from agent.kernel.model import Backend
from bpf import wire
from bpf.maps import Map

_U32 = 0xFFFFFFFF


class Services:
    """Both tables, and what is in them."""

    def __init__(self, services: Map, backends: Map) -> None:
        """Takes over what a predecessor left, also what it left half done."""
        self._services = services
        self._backends = backends
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
        self._next = max((service.id for service, _ in self._known.values()), default=0) + 1

    def set(self, key: wire.Endpoint, backends: Iterable[Backend], *, l7: bool) -> None:
        """What was there before still is when it raises.

        :raises MapFullError: no room.
        :raises ValueError: a backend is no IPv4 address with a port.
        """
        wanted = tuple(backends)
        endpoints = [wire.Endpoint(backend.address, backend.port).pack() for backend in wanted]
        flags = wire.SERVICE_L7 if l7 else 0
        known = self._known.get(key)
        if known is not None:
            old, had = known
            if had == wanted and old.flags == flags and old.count == len(wanted):
                return
            new = wire.Service(old.id, (old.generation + 1) & _U32, len(wanted), flags)
        else:
            old = None
            new = wire.Service(self._next, 0, len(wanted), flags)
            self._next = (self._next + 1) & _U32
        try:
            for slot, endpoint in enumerate(endpoints):
                self._backends.update(wire.BackendKey(new.id, new.generation, slot).pack(), endpoint)
            self._services.update(key.pack(), new.pack())
        except OSError:
            self._delete_backends(new)
            raise
        self._known[key] = new, wanted
        if old is not None:
            self._delete_backends(old)

    def remove(self, key: wire.Endpoint) -> None:
        known = self._known.pop(key, None)
        self._services.delete(key.pack())
        if known is not None:
            self._delete_backends(known[0])

    def _delete_backends(self, service: wire.Service) -> None:
        for slot in range(service.count):
            self._backends.delete(wire.BackendKey(service.id, service.generation, slot).pack())

    def all(self) -> dict[tuple[str, int], tuple[bool, list[Backend]]]:
        return {
            (key.address, key.port): (bool(service.flags & wire.SERVICE_L7), list(backends))
            for key, (service, backends) in self._known.items()
        }
