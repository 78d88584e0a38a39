"""The pinned tables as the programs read them: looked up, and never written.

Owns descriptors of its own, so that nobody else waits for it; each question here is one that a program asks
(``bpf/lib/policy.h``, ``bpf/lib/balance.h``), by the same lookups. Needs no agent, only the pins.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from agent.kernel.errors import KernelError
from bpf import checks, wire
from bpf.maps import Map, MapError
from bpf.wire import Direction, Endpoint, Reason, Role, SpliceCounter

#: The maps that :class:`Tables` reads.
NAMES = (
    "roles",
    "pods",
    "peers",
    "services",
    "backends",
    "members",
    "affinity",
    "policies",
    "classes",
    "networks",
    "interfaces",
    "listeners",
    "splice_counters",
)

_ADDRESS_BITS = 128
_ATTEMPTS = 5
_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")
_POLICY_FLAGS_KEY = wire.PolicyKey(wire.POLICY_GENERATION, 0).pack()


class Slot(NamedTuple):
    """A backend of a service, and the share of the draws that it gets (all of them together: 1)."""

    address: str
    port: int
    share: float


class Judgement(NamedTuple):
    """What ``judge()`` finds, and by which entry. ``port`` is None where no entry was found."""

    reason: Reason | None
    generation: int = 0
    identity: int = 0  #: as it was looked up: IDENTITY_MESH where verdicts tell no workload from another
    address_class: int = 0
    port: int | None = None  #: 0: the entry for any other port


class NetworkJudgement(NamedTuple):
    """What ``network_allows()`` finds. Who is not isolated has no table."""

    allowed: bool
    isolated: bool = False
    address_class: int = 0


class Tables:
    """Use as a context manager, in one thread.

    :raises KernelError: by :meth:`open`, when the pins are not there or not this version's.
    """

    def __init__(self, maps: Mapping[str, Map]) -> None:
        """``maps`` stay the caller's."""
        self._maps = maps
        self._closing = ExitStack()
        self._blocks: dict[tuple[int, int], dict[str, int]] = {}

    @classmethod
    def open(cls, pins: Path) -> Self:
        """The maps that are pinned in ``pins`` (the folder that holds ``v<ABI>``)."""
        folder = pins / f"v{wire.ABI}"
        if not folder.is_dir():
            there = sorted(path.name for path in pins.glob("v*")) if pins.is_dir() else []
            hint = f"; there is {', '.join(there)}, of another version" if there else ""
            raise KernelError(f"pins {pins}: no {folder.name}{hint}")
        with ExitStack() as stack:
            try:
                found = {
                    name: stack.enter_context(Map.open(str(folder / name), read_only=True)) for name in NAMES
                }
            except MapError as error:
                raise KernelError(f"pins {folder}: {error.strerror}") from error
            tables = cls(found)
            tables._closing = stack.pop_all()
        return tables

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    # Who

    def has_role(self, role: Role) -> bool:
        """Whether any cgroup has it."""
        return any(_U32.unpack(value)[0] == role for _, value in self._maps["roles"].items())

    def pods(self) -> dict[int, wire.Pod]:
        """By netns cookie."""
        return {_U64.unpack(key)[0]: wire.Pod.unpack(value) for key, value in self._maps["pods"].items()}

    def pod(self, netns: int) -> wire.Pod | None:
        value = self._maps["pods"].lookup(_U64.pack(netns))
        return None if value is None else wire.Pod.unpack(value)

    def peer(self, address: str) -> wire.Peer | None:
        value = self._maps["peers"].lookup(wire.pack_address(address))
        return None if value is None else wire.Peer.unpack(value)

    def interface(self, netns: int) -> wire.Interface | None:
        """The host's end of a pod's veth (of several any one: they say the same)."""
        for _, value in self._maps["interfaces"].items():
            found = wire.Interface.unpack(value)
            if found.netns == netns:
                return found
        return None

    def has_listener(self, address: str, port: int) -> bool:
        return self._maps["listeners"].lookup(Endpoint(address, port).pack()) is not None

    # Services

    def service(self, key: Endpoint) -> wire.Service | None:
        value = self._maps["services"].lookup(key.pack())
        if value is None:
            return None
        found = wire.Service.unpack(value)
        if found.check == checks.of_service(checks.seed_of(key), found):
            return found
        # What does not prove itself is a service without backends to the programs.
        return replace(found, count=0, flags=0, few=())

    def slots(self, key: Endpoint, service: wire.Service) -> tuple[list[Slot], list[int]]:
        """The backends with what ``draw()`` gives to each, and the slots that are not there, or of another service."""
        seed = checks.seed_of(key)
        raw: dict[int, wire.Backend] = {}
        missing = []
        for slot in range(service.count):
            found = self._slot(service, slot)
            if found is None or found.check != checks.of_backend(
                seed, found.address, found.port, found.protocol
            ):
                missing.append(slot)
            else:
                raw[slot] = found
        shares: dict[tuple[str, int], float] = {}
        for backend in raw.values():
            own = 1.0 if backend.share == wire.SHARE_WHOLE else backend.share / 2**32
            for one, part in ((backend, own), (raw.get(backend.other), 1.0 - own)):
                if one is not None:
                    end = (one.address, one.port)
                    shares[end] = shares.get(end, 0.0) + part / service.count
        return [Slot(address, port, share) for (address, port), share in sorted(shares.items())], missing

    def _slot(self, service: wire.Service, slot: int) -> wire.Backend | None:
        if service.flags & wire.SERVICE_FEW:
            if slot >= len(service.few):
                return None
            few = service.few[slot]
            return wire.Backend(few.address, few.port, few.protocol, 0, slot, wire.SHARE_WHOLE, few.check)
        value = self._maps["backends"].lookup(wire.BackendKey(service.id, service.generation, slot).pack())
        return None if value is None else wire.Backend.unpack(value)

    def kept(self, netns: int, key: Endpoint, service: wire.Service) -> tuple[str, int] | None:
        """The backend that the pod had last and gets again (session affinity)."""
        if not service.flags & wire.SERVICE_AFFINITY:
            return None
        value = self._maps["affinity"].lookup(wire.AffinityKey(netns, service.id).pack())
        if value is None:
            return None
        last = wire.Affinity.unpack(value)
        seconds = service.flags >> wire.SERVICE_AFFINITY_SHIFT
        if time.clock_gettime_ns(time.CLOCK_MONOTONIC) - last.used >= seconds * 1_000_000_000:
            return None
        end = (last.address, last.port)
        check = checks.of_backend(checks.seed_of(key), *end, last.protocol)
        if service.flags & wire.SERVICE_FEW:
            found = any((few.address, few.port, few.check) == (*end, check) for few in service.few)
            return end if found else None
        member = wire.MemberKey(service.id, service.generation, last.address, last.port, last.protocol)
        return end if self._maps["members"].lookup(member.pack()) == _U32.pack(check) else None

    # Verdicts

    def judge(self, netns: int, identity: int, source: str, port: int) -> Judgement:
        """As ``judge()``: AuthorizationPolicy and mTLS mode of a pod of this node."""
        policy = self._inner("policies", _U64.pack(netns))
        if policy is None:
            return Judgement(Reason.NO_POLICY, identity=identity)
        with policy:
            value = policy.lookup(_POLICY_FLAGS_KEY)
            flags = _U32.unpack(value)[0] if value is not None else 0
            generation = flags & wire.POLICY_GENERATION_MASK
            if identity >= wire.IDENTITY_FIRST and flags & wire.POLICY_ALIKE:
                identity = wire.IDENTITY_MESH
            number = 0
            if flags & wire.POLICY_CLASSES and identity != wire.IDENTITY_PROBE:
                number = self.class_of(netns, generation, source)
            for asked in (port, 0):
                value = policy.lookup(wire.PolicyKey(identity, asked, number).pack())
                if value is not None:
                    reason = None if _U32.unpack(value)[0] else Reason.POLICY
                    return Judgement(reason, generation, identity, number, asked)
        return Judgement(Reason.POLICY, generation, identity, number)

    def class_of(self, netns: int, generation: int, source: str) -> int:
        key = wire.ClassKey(wire.CLASS_PREFIX_BITS + _ADDRESS_BITS, generation, netns, source)
        value = self._maps["classes"].lookup(key.pack())
        return 0 if value is None else _U32.unpack(value)[0] & 0xFFFF

    def network(
        self, netns: int, direction: Direction, other: str, protocol: int, port: int
    ) -> NetworkJudgement:
        """As ``network_allows()``: NetworkPolicy of a pod of this node."""
        table = self._inner("networks", wire.NetworkOf(netns, direction).pack())
        if table is None:
            return NetworkJudgement(True)
        with table:
            key = wire.NetworkKey(wire.NETWORK_PREFIX_BITS + _ADDRESS_BITS, 0, wire.pack_address(other))
            value = table.lookup(key.pack())
            number = _U32.unpack(value)[0] if value is not None else 0
            key = wire.NetworkKey(
                wire.NETWORK_PREFIX_BITS + wire.NETWORK_PORT_BITS,
                number + 1,
                wire.network_port(protocol, port),
            )
            value = table.lookup(key.pack())
        return NetworkJudgement(value is not None and bool(_U32.unpack(value)[0]), True, number)

    def policy_entries(self, netns: int) -> tuple[int, dict[wire.PolicyKey, bool]] | None:
        """The generation with its flags, and every verdict; None: there is no policy, and everything is refused."""
        policy = self._inner("policies", _U64.pack(netns))
        if policy is None:
            return None
        flags = 0
        found: dict[wire.PolicyKey, bool] = {}
        with policy:
            for data, value in policy.items():
                if data == _POLICY_FLAGS_KEY:
                    flags = _U32.unpack(value)[0]
                else:
                    found[wire.PolicyKey.unpack(data)] = bool(_U32.unpack(value)[0])
        return flags, found

    def class_entries(self, netns: int, generation: int) -> dict[str, int]:
        """Class by block of addresses: those of a generation never change, so that the map is read once for all pods."""
        if (netns, generation) not in self._blocks:
            self._blocks = {}
            for data, value in self._maps["classes"].items():
                key = wire.ClassKey.unpack(data)
                block = block_text(key.address, key.prefix_length - wire.CLASS_PREFIX_BITS)
                of_pod = self._blocks.setdefault((key.netns, key.generation), {})
                of_pod[block] = _U32.unpack(value)[0]
        return self._blocks.get((netns, generation), {})

    def network_entries(self, netns: int, direction: Direction) -> dict[wire.NetworkKey, int] | None:
        """Both stages; None: not isolated."""
        table = self._inner("networks", wire.NetworkOf(netns, direction).pack())
        if table is None:
            return None
        with table:
            return {wire.NetworkKey.unpack(key): _U32.unpack(value)[0] for key, value in table.items()}

    def splice_switch(self) -> int:
        """0: this node splices; 1: switched off; :data:`bpf.wire.SPLICE_UNSUPPORTED`: the kernel cannot."""
        value = self._maps["splice_counters"].lookup(_U32.pack(SpliceCounter.OFF))
        return 1 if value is None else int(_U64.unpack(value)[0])

    def _inner(self, name: str, key: bytes) -> Map | None:
        """The inner map of this moment; the caller's."""
        for _ in range(_ATTEMPTS):
            value = self._maps[name].lookup(key)
            if value is None:
                return None
            try:
                return Map.open_id(_U32.unpack(value)[0])
            except MapError as error:
                last = error
                # Swapped between the two calls; then the next look finds its successor.
        raise KernelError(f"map {name}: an inner map cannot be opened: {last.strerror}")


def block_text(address: str, bits: int) -> str:
    """A block of addresses, of the bits of ``struct address``."""
    return f"{address}/{bits if ':' in address else bits - 96}"
