"""The tables ``policies``, ``classes`` and ``networks``: a pod's verdicts, swapped whole.

Owns how a swap is one: verdicts are an inner map that takes the old one's place, and what address is in which class stands under
the generation of the verdicts that it belongs to, from before they are in force until after they are not.
"""

from __future__ import annotations

import ipaddress
import os
import struct
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait

from agent.kernel.model import Direction, Network
from agent.kernel.pods import netns_key
from bpf import schema, wire
from bpf.maps import Map, MapError

_NUMBER = struct.Struct("=I")
_GENERATION_KEY = wire.PolicyKey(wire.POLICY_GENERATION, 0).pack()
_MAPPED_BITS = 96
_MAPPED = ipaddress.IPv6Address("::ffff:0:0")
_EVERY_IPV4 = "0.0.0.0/0"
_LAST_PORT = 0xFFFF

#: Pods whose first verdicts are put in force at once; and seconds between looks whether they are.
_FIRST_AT_ONCE = 8
_LOOK = 0.0003

#: (identity, port) or (identity, port, class of the source's address) to whether it may come.
Verdicts = Mapping[tuple[int, ...], bool]


def block_prefix(block: str) -> tuple[str, int]:
    """Address and length of a block, as bits of ``struct address``.

    :raises ValueError: it is no block.
    """
    network = ipaddress.ip_network(block)
    bits = network.prefixlen + (_MAPPED_BITS if network.version == 4 else 0)
    return str(network.network_address), bits


def _of_own_family(blocks: Mapping[str, int]) -> Mapping[str, int]:
    """The same as the kernel has to be told: ``::/0`` has no IPv4 addresses, though they lie among the IPv6 ones there."""
    around = any(":" in block and _MAPPED in ipaddress.IPv6Network(block) for block in blocks)
    return {**blocks, _EVERY_IPV4: 0} if around and _EVERY_IPV4 not in blocks else blocks


class Policies:
    """See the module. Swaps of different pods may go on at once."""

    def __init__(self, policies: Map, classes: Map, networks: Map) -> None:
        self._policies = policies
        self._classes = classes
        self._networks = networks
        self._lock = threading.Lock()
        #: The first verdicts of pods: see :meth:`_publish`. Lookups of one Map share a buffer.
        self._first = ThreadPoolExecutor(_FIRST_AT_ONCE, thread_name_prefix="first verdicts")
        self._view = Map(os.dup(policies.fd))
        #: What stands in ``classes``, by netns cookie.
        self._class_keys: dict[int, set[bytes]] = {}
        for key in tuple(classes.keys()):
            self._class_keys.setdefault(wire.ClassKey.unpack(key).netns, set()).add(key)

    def close(self) -> None:
        """Nothing is set any more; what was stays."""
        self._first.shutdown()
        self._view.close()

    def set_policy(
        self, netns_cookie: int, table: Verdicts, generation: int, classes: Mapping[str, int]
    ) -> None:
        """Make an inner map of exactly that size, fill it, and let it take the old one's place.

        :raises ValueError: an identity, port, class, block or generation that is none.
        :raises MapFullError: too many pods or classes; the old policy stays.
        """
        if not 1 <= generation <= wire.POLICY_GENERATION_MASK:
            raise ValueError(f"generation {generation} is not from 1 to {wire.POLICY_GENERATION_MASK}")
        flags = generation
        if classes:
            flags |= wire.POLICY_CLASSES
        if any(key[0] == wire.IDENTITY_MESH for key in table):
            flags |= wire.POLICY_ALIKE
        model = schema.INNER_POLICY
        new, fresh = self._write_classes(netns_cookie, classes, generation)
        try:
            with Map.create(
                model.type, model.name, model.key_size, model.value_size, len(table) + 1, flags=model.flags
            ) as inner:
                inner.update(_GENERATION_KEY, _NUMBER.pack(flags))
                for (identity, port, *rest), allowed in table.items():
                    number = rest[0] if rest else 0
                    if not (0 <= identity < wire.POLICY_GENERATION and 0 <= port <= _LAST_PORT):
                        raise ValueError(f"no verdict is about identity {identity}, port {port}")
                    inner.update(wire.PolicyKey(identity, port, number).pack(), _NUMBER.pack(allowed))
                self._publish(netns_key(netns_cookie), inner)
        except (OSError, ValueError, struct.error):
            self._forget_classes(netns_cookie, fresh)
            raise
        self._forget_classes(netns_cookie, self._class_keys.get(netns_cookie, set()) - new)

    def _publish(self, key: bytes, inner: Map) -> None:
        """Put verdicts in force, and wait until no program has those before any more.

        The kernel does that within its call, some ten milliseconds long, for first ones too, although before them everything was
        refused: of these it is enough to see that they are there.
        """
        value = struct.pack("=i", inner.fd)
        if self._has(key):
            self._policies.update(key, value)
            return
        updating = self._first.submit(self._policies.update, key, value)
        while not (updating.done() or self._has(key)):
            wait([updating], timeout=_LOOK)
        if updating.done():
            updating.result()

    def _has(self, key: bytes) -> bool:
        with self._lock:
            return self._view.lookup(key) is not None

    def _write_classes(
        self, netns_cookie: int, classes: Mapping[str, int], generation: int
    ) -> tuple[set[bytes], set[bytes]]:
        """Their keys, and those of them that were not there. What finds no room leaves none of the others behind."""
        new: set[bytes] = set()
        fresh: set[bytes] = set()
        try:
            with self._lock:
                known = self._class_keys.setdefault(netns_cookie, set()) if classes else set()
                for block, number in classes.items():
                    if not 1 <= number <= 0xFFFF:
                        raise ValueError(f"class {number} of {block} is not from 1 to 65535")
                for block, number in _of_own_family(classes).items():
                    address, bits = block_prefix(block)
                    prefix = wire.CLASS_PREFIX_BITS + bits
                    key = wire.ClassKey(prefix, generation, netns_cookie, address).pack()
                    self._classes.update(key, _NUMBER.pack(number))
                    new.add(key)
                    if key not in known:
                        known.add(key)
                        fresh.add(key)
        except (OSError, ValueError):
            self._forget_classes(netns_cookie, fresh)
            raise
        return new, fresh

    def _forget_classes(self, netns_cookie: int, keys: set[bytes]) -> None:
        with self._lock:
            known = self._class_keys.get(netns_cookie, set())
            for key in keys & known:
                self._classes.delete(key)
                known.discard(key)
            if not known:
                self._class_keys.pop(netns_cookie, None)

    def remove(self, netns_cookie: int) -> None:
        """From now on everything is refused; NetworkPolicy forbids nothing more."""
        self._policies.delete(netns_key(netns_cookie))
        self._forget_classes(netns_cookie, set(self._class_keys.get(netns_cookie, ())))
        for direction in Direction:
            self._networks.delete(wire.NetworkOf(netns_cookie, direction).pack())

    def policy(self, netns_cookie: int) -> tuple[int, dict[tuple[int, ...], bool]] | None:
        """Generation and verdicts in force; None when there are none."""
        value = self._policies.lookup(netns_key(netns_cookie))
        if value is None:
            return None
        try:
            inner = Map.open_id(_NUMBER.unpack(value)[0])
        except MapError:  # swapped just now
            return self.policy(netns_cookie)
        generation = 0
        table: dict[tuple[int, ...], bool] = {}
        with inner:
            for key, verdict in inner.items():
                if key == _GENERATION_KEY:
                    generation = _NUMBER.unpack(verdict)[0] & wire.POLICY_GENERATION_MASK
                    continue
                entry = wire.PolicyKey.unpack(key)
                name = (entry.identity, entry.port)
                number = (entry.address_class,) if entry.address_class else ()
                table[(*name, *number)] = bool(_NUMBER.unpack(verdict)[0])
        return generation, table

    def classes(self, netns_cookie: int, generation: int) -> dict[str, int]:
        """The classes by block, of that generation of a pod's policy."""
        found: dict[str, int] = {}
        for data in tuple(self._class_keys.get(netns_cookie, ())):
            key = wire.ClassKey.unpack(data)
            value = self._classes.lookup(data)
            if key.generation == generation and value is not None and (number := _NUMBER.unpack(value)[0]):
                found[_block(key.address, key.prefix_length - wire.CLASS_PREFIX_BITS)] = number
        return found

    # NetworkPolicy

    def set_network(self, netns_cookie: int, direction: Direction, network: Network | None) -> None:
        """Swap the whole of NetworkPolicy of a pod in one direction; None: the pod is not isolated.

        :raises ValueError: a block, class, protocol or port that is none.
        :raises MapFullError: too many pods; what was there before stays.
        """
        key = wire.NetworkOf(netns_cookie, direction).pack()
        if network is None:
            self._networks.delete(key)
            return
        elements = network_elements(network)
        model = schema.INNER_NETWORK
        with Map.create(
            model.type, model.name, model.key_size, model.value_size, len(elements) or 1, flags=model.flags
        ) as inner:
            for element, number in elements.items():
                inner.update(element, _NUMBER.pack(number))
            self._networks.update(key, struct.pack("=i", inner.fd))

    def network(self, netns_cookie: int, direction: Direction) -> dict[bytes, int] | None:
        """The elements in force, as :func:`network_elements` gives them; None: not isolated."""
        value = self._networks.lookup(wire.NetworkOf(netns_cookie, direction).pack())
        if value is None:
            return None
        try:
            inner = Map.open_id(_NUMBER.unpack(value)[0])
        except MapError:  # swapped just now
            return self.network(netns_cookie, direction)
        with inner:
            return {key: _NUMBER.unpack(found)[0] for key, found in inner.items()}


def network_elements(network: Network) -> dict[bytes, int]:
    """What the kernel is told of one direction of a pod.

    :raises ValueError: see :meth:`Policies.set_network`.
    """
    elements: dict[bytes, int] = {}
    for block, number in _of_own_family(network.classes).items():
        if number < 0:
            raise ValueError(f"class {number} of {block}")
        address, bits = block_prefix(block)
        key = wire.NetworkKey(wire.NETWORK_PREFIX_BITS + bits, 0, wire.pack_address(address))
        elements[key.pack()] = number
    for number, allowed in network.allowed.items():
        for protocol, first, last in allowed:
            for port, bits in _port_prefixes(first, last):
                # No protocol: every one of them.
                length = wire.NETWORK_PREFIX_BITS + (8 + bits if protocol else 0)
                stage_key = wire.NetworkKey(length, number + 1, wire.network_port(protocol, port))
                elements[stage_key.pack()] = 1
    return elements


def _port_prefixes(first: int, last: int) -> list[tuple[int, int]]:
    """A range of ports as prefixes: (port, bits)."""
    if not 0 <= first <= last <= _LAST_PORT:
        raise ValueError(f"ports {first} to {last}")
    found = []
    while first <= last:
        size = first & -first or _LAST_PORT + 1
        while first + size - 1 > last:
            size >>= 1
        found.append((first, 17 - size.bit_length()))
        first += size
    return found


def _block(address: str, bits: int) -> str:
    return f"{address}/{bits if ':' in address else bits - _MAPPED_BITS}"
