"""The tables ``services``, ``backends`` and ``members``.

Owns how a service changes under running programs, so that none ever finds no backend, or one that is not the service's:

- Few backends without weights stand in the service itself, which is written as a whole.
- Few backends of many change: slots are rewritten one by one (a removed backend's gets an added one, or the last), then the
  number of slots is changed, then what is beyond it goes. What is written grows with the change and not with the service.
- Otherwise, and where backends have different weights, all slots are written under a new generation, then the service names
  that generation, then the old ones go.

A program that read the service just before asks again when its slot is gone. ``members`` says who is a backend, for services
with slots whose clients keep theirs; who had which one last (``affinity``, ``datagrams``) is the programs' own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import NamedTuple

from agent.kernel.model import Backend, Frontend, Service
from bpf import checks, wire
from bpf.maps import Map
from bpf.wire import Protocol

_U32 = 0xFFFFFFFF
#: Slots are rewritten one by one while no more than one in so many changes.
_EDITED = 4


class _Known(NamedTuple):
    """One service in the kernel. ``slots`` are in the kernel's order; their weights are 0 in a predecessor's alias table."""

    service: wire.Service  #: without its check, and without those that stand in it
    slots: Sequence[Backend]
    weighted: bool = False


class Services:
    """The tables, and what is in them."""

    def __init__(self, services: Map, backends: Map, members: Map) -> None:
        """Takes over what a predecessor left, also what it left half done."""
        self._services = services
        self._backends = backends
        self._members = members
        self._known: dict[wire.Endpoint, _Known] = {}
        found = [
            (wire.Endpoint.unpack(key), wire.Service.unpack(value)) for key, value in self._services.items()
        ]
        # As bytes: of a hundred thousand backends most are what is wished, and their records would only be thrown away.
        by_generation: dict[bytes, dict[int, bytes]] = {}
        for key, value in backends.items():
            by_generation.setdefault(key[:8], {})[struct.unpack_from("=I", key, 8)[0]] = value
        strangers: dict[bytes, set[bytes]] = {}
        for key, _ in members.items():
            strangers.setdefault(key[:8], set()).add(key)
        self._next = 1
        for frontend, service in found:
            self._next = max(self._next, service.id + 1)
            slots = by_generation.get(_generation(service), {})
            raw = [wire.Backend.unpack(slots.pop(slot)) for slot in range(service.count) if slot in slots]
            ends = service.few if _has_few(service.flags) else raw
            seed = checks.seed_of(frontend)
            # A table that is not whole, or of weights, is written anew when it is set.
            weighted = (
                len({(one.address, one.port) for one in ends}) != service.count
                or service.check != checks.of_service(seed, service)
                or any(one.share != wire.SHARE_WHOLE for one in raw)
                or any(
                    one.protocol != frontend.protocol
                    or one.check != checks.of_backend(seed, one.address, one.port, one.protocol)
                    for one in ends
                )
            )
            if _has_members(service.flags):
                wished = {_member(service, Backend(one.address, one.port), one.protocol) for one in ends}
                there = strangers.get(_generation(service), set())
                weighted = weighted or not wished <= there
                there -= wished
            backends_found = tuple(Backend(one.address, one.port, 0 if weighted else 1) for one in ends)
            self._known[frontend] = _Known(replace(service, check=0, few=()), backends_found, weighted)
        for generation, slots in by_generation.items():
            for slot in slots:
                backends.delete(generation + struct.pack("=I", slot))
        for keys in strangers.values():
            for key in keys:
                members.delete(key)

    def set(self, key: wire.Endpoint, backends: Iterable[Backend], *, l7: bool, affinity: int) -> None:
        """What was there before still is when it raises.

        :param affinity: seconds for which a client keeps its backend after it dialled last; 0 is not at all.
        :raises MapFullError: no room.
        :raises ValueError: a backend is no IP address with a port, or has no weight of 0 or more, or ``affinity`` is no
            number of seconds.
        """
        wanted = _checked(backends, key.protocol)
        if not 0 <= affinity <= _U32 >> wire.SERVICE_AFFINITY_SHIFT:
            raise ValueError(f"session affinity of {affinity} s")
        flags = wire.SERVICE_L7 if l7 else 0
        if affinity:
            flags |= wire.SERVICE_AFFINITY | affinity << wire.SERVICE_AFFINITY_SHIFT
        known = self._known.get(key)
        weighted = len({backend.weight for backend in wanted}) > 1
        if not weighted and len(wanted) <= wire.FEW_BACKENDS:
            flags |= wire.SERVICE_FEW
        elif affinity or key.protocol == Protocol.UDP:
            flags |= wire.SERVICE_MEMBERS
        if known is None:
            new = wire.Service(self._next, 0, len(wanted), flags)
            self._next = (self._next + 1) & _U32
            self._swap(key, None, new, wanted, weighted)
            return
        if _kept_in(known.service.flags) == _kept_in(flags) and not weighted and not known.weighted:
            had = set(known.slots)
            added = [backend for backend in wanted if backend not in had]
            removed = had.difference(wanted)
            if not added and not removed and known.service.flags == flags:
                # What a predecessor wrote is kept as the caller has it: there once.
                same = {backend: backend for backend in wanted}
                self._known[key] = known._replace(slots=tuple(same[backend] for backend in known.slots))
                return
            if not _has_few(flags) and (len(added) + len(removed)) * _EDITED <= len(wanted):
                self._edit(key, known, flags, added, removed)
                return
        elif weighted and known.weighted and known.service.flags == flags and known.slots == wanted:
            return
        old = known.service
        new = wire.Service(old.id, (old.generation + 1) & _U32, len(wanted), flags)
        self._swap(key, known, new, wanted, weighted)

    def damaged(self, key: wire.Endpoint) -> bool:
        """Whether the kernel has not what was set; then the next :meth:`set` writes all of it anew."""
        known = self._known.get(key)
        if known is None:
            return False
        service = known.service
        whole = self._services.lookup(key.pack()) == _packed(key, service, known.slots) and (
            _has_few(service.flags)
            or all(self._has(key, service, slot, backend) for slot, backend in enumerate(known.slots))
        )
        if not whole:
            slots = tuple(backend._replace(weight=0) for backend in known.slots)
            self._known[key] = known._replace(slots=slots, weighted=True)
        return not whole

    def _has(self, key: wire.Endpoint, service: wire.Service, slot: int, backend: Backend) -> bool:
        check = _check(key, backend)
        value = self._backends.lookup(_slot(service, slot))
        if value is None:
            return False
        found = wire.Backend.unpack(value)
        wished = (backend.address, backend.port, key.protocol, check)
        if (found.address, found.port, found.protocol, found.check) != wished:
            return False
        member = _member(service, backend, key.protocol)
        return not _has_members(service.flags) or self._members.lookup(member) == _CHECK.pack(check)

    def remove(self, key: wire.Endpoint) -> None:
        known = self._known.pop(key, None)
        self._services.delete(key.pack())
        if known is not None:
            self._delete(known.service, known.slots, key.protocol)

    def all(self) -> dict[Frontend, Service]:
        return {
            Frontend(key.address, key.port, Protocol(key.protocol)): Service(
                bool(known.service.flags & wire.SERVICE_L7),
                tuple(known.slots),
                known.service.flags >> wire.SERVICE_AFFINITY_SHIFT
                if known.service.flags & wire.SERVICE_AFFINITY
                else 0,
            )
            for key, known in self._known.items()
        }

    def _swap(
        self,
        key: wire.Endpoint,
        known: _Known | None,
        new: wire.Service,
        wanted: tuple[Backend, ...],
        weighted: bool,
    ) -> None:
        """All anew, under another generation."""
        table = alias_table([backend.weight for backend in wanted]) if weighted else None
        try:
            for slot, backend in enumerate(() if _has_few(new.flags) else wanted):
                share, other = table[slot] if table is not None else (wire.SHARE_WHOLE, slot)
                self._put(key, new, slot, backend, other, share)
                if _has_members(new.flags):
                    self._put_member(key, new, backend)
            self._services.update(key.pack(), _packed(key, new, wanted))
        except OSError:
            self._delete(new, wanted, key.protocol)
            raise
        self._known[key] = _Known(new, wanted, weighted)
        if known is not None:
            self._delete(known.service, known.slots, key.protocol)

    def _edit(
        self,
        key: wire.Endpoint,
        known: _Known,
        flags: int,
        added: list[Backend],
        removed: AbstractSet[Backend],
    ) -> None:
        """Slot by slot; see the module."""
        old, protocol = known.service, key.protocol
        slots = list(known.slots)
        fresh = list(added)
        free = [slot for slot, backend in enumerate(slots) if backend in removed]
        changed: dict[int, Backend] = {}
        while free and fresh:
            changed[free.pop(0)] = fresh.pop()
        for backend in fresh:
            changed[len(slots)] = backend
            slots.append(backend)
        # What is left free is filled from the end, so that the slots stay without a gap.
        count = len(slots) - len(free)
        holes = [slot for slot in free if slot < count]
        for slot, backend in changed.items():
            slots[slot] = backend
        for backend in (backend for slot, backend in enumerate(slots) if slot >= count and slot not in free):
            changed[holes.pop(0)] = backend
        for slot, backend in changed.items():
            slots[slot] = backend
        new = wire.Service(old.id, old.generation, count, flags)
        has_members = _has_members(flags)
        try:
            if has_members:
                for backend in added:
                    self._put_member(key, old, backend)
            for slot, backend in changed.items():
                self._put(key, new, slot, backend, slot, wire.SHARE_WHOLE)
            if new != old:
                self._services.update(key.pack(), _packed(key, new, ()))
        except OSError:
            # As it was: what there is no room for is what would be new.
            for slot in changed:
                if slot < old.count:
                    self._put(key, old, slot, known.slots[slot], slot, wire.SHARE_WHOLE)
                else:
                    self._backends.delete(_slot(old, slot))
            if has_members:
                for backend in added:
                    self._members.delete(_member(old, backend, protocol))
            raise
        self._known[key] = _Known(new, tuple(slots[:count]))
        for slot in range(count, old.count):
            self._backends.delete(_slot(old, slot))
        if has_members:
            for backend in removed:
                self._members.delete(_member(old, backend, protocol))

    def _put(
        self, key: wire.Endpoint, service: wire.Service, slot: int, backend: Backend, other: int, share: int
    ) -> None:
        check = _check(key, backend)
        value = wire.Backend(backend.address, backend.port, key.protocol, 0, other, share, check)
        self._backends.update(_slot(service, slot), value.pack())

    def _put_member(self, key: wire.Endpoint, service: wire.Service, backend: Backend) -> None:
        self._members.update(_member(service, backend, key.protocol), _CHECK.pack(_check(key, backend)))

    def _delete(self, service: wire.Service, slots: Iterable[Backend], protocol: int) -> None:
        if _has_few(service.flags):
            return
        for slot in range(service.count):
            self._backends.delete(_slot(service, slot))
        if _has_members(service.flags):
            for backend in slots:
                self._members.delete(_member(service, backend, protocol))


_CHECK = struct.Struct("=I")


def alias_table(weights: Sequence[int]) -> list[tuple[int, int]]:
    """(share, other slot) for each slot, as ``struct backend`` has them (Vose, 1991).

    A slot that is drawn is its own backend's for ``share`` / 2^32 of the draws, and the other's for the rest. Exact but for the
    rounding of each share to 32 bits.

    :param weights: positive, at least one.
    """
    total, count = sum(weights), len(weights)
    left = [weight * count for weight in weights]
    table = [(wire.SHARE_WHOLE, slot) for slot in range(count)]
    small = [slot for slot in range(count) if left[slot] < total]
    large = [slot for slot in range(count) if left[slot] > total]
    while small and large:
        slot, other = small.pop(), large[-1]
        table[slot] = (min((left[slot] << 32) // total, wire.SHARE_WHOLE - 1), other)
        left[other] -= total - left[slot]
        if left[other] <= total:
            large.pop()
            if left[other] < total:
                small.append(other)
    return table


def _checked(backends: Iterable[Backend], protocol: int) -> tuple[Backend, ...]:
    """Each backend once, without those of no weight."""
    found: dict[tuple[str, int], Backend] = {}
    for backend in backends:
        if not 0 <= backend.weight <= _U32:
            raise ValueError(f"backend {backend.address}:{backend.port}: weight {backend.weight}")
        wire.Endpoint(backend.address, backend.port, protocol).pack()
        if backend.weight:
            found[backend.address, backend.port] = backend
    if len({backend.weight for backend in found.values()}) == 1:
        return tuple(
            backend if backend.weight == 1 else backend._replace(weight=1) for backend in found.values()
        )
    return tuple(found.values())


def _has_members(flags: int) -> bool:
    return bool(flags & wire.SERVICE_MEMBERS)


def _has_few(flags: int) -> bool:
    return bool(flags & wire.SERVICE_FEW)


def _kept_in(flags: int) -> int:
    """Where the backends are."""
    return flags & (wire.SERVICE_FEW | wire.SERVICE_MEMBERS)


def _check(key: wire.Endpoint, backend: Backend) -> int:
    return checks.of_backend(checks.seed_of(key), backend.address, backend.port, key.protocol)


def _packed(key: wire.Endpoint, service: wire.Service, slots: Iterable[Backend]) -> bytes:
    """As it is in the map: with its check, and with the backends if it has them in itself."""
    seed = checks.seed_of(key)
    few: tuple[wire.FewBackend, ...] = ()
    if _has_few(service.flags):
        few = tuple(
            wire.FewBackend(
                b.address, b.port, key.protocol, 0, checks.of_backend(seed, b.address, b.port, key.protocol)
            )
            for b in slots
        )
    return replace(service, check=checks.of_service(seed, service), few=few).pack()


def _generation(service: wire.Service) -> bytes:
    """What the keys of its backends and members begin with."""
    return struct.pack("=II", service.id, service.generation)


def _slot(service: wire.Service, slot: int) -> bytes:
    return struct.pack("=III", service.id, service.generation, slot)


def _member(service: wire.Service, backend: Backend, protocol: int) -> bytes:
    return wire.MemberKey(service.id, service.generation, backend.address, backend.port, protocol).pack()
