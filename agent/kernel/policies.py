"""The table ``policies``: a pod's verdicts, swapped whole."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from agent.kernel.pods import netns_key
from bpf import schema, wire
from bpf.maps import Map, MapError

_VERDICT = struct.Struct("=I")
_GENERATION_KEY = wire.PolicyKey(wire.POLICY_GENERATION, 0).pack()


def set_policy(
    policies: Map, netns_cookie: int, table: Mapping[tuple[int, int], bool], generation: int
) -> None:
    """Make an inner map of exactly that size, fill it, and let it take the old one's place.

    :raises ValueError: an identity, port or generation that is none.
    :raises MapFullError: too many pods; the old policy stays.
    """
    if not 1 <= generation <= 0xFFFFFFFF:
        raise ValueError(f"generation {generation} is not from 1 to 2^32 - 1")
    model = schema.INNER_POLICY
    with Map.create(
        model.type, model.name, model.key_size, model.value_size, len(table) + 1, flags=model.flags
    ) as inner:
        inner.update(_GENERATION_KEY, _VERDICT.pack(generation))
        for (identity, port), allowed in table.items():
            if not (0 <= identity < wire.POLICY_GENERATION and 0 <= port <= 65535):
                raise ValueError(f"no verdict is about identity {identity}, port {port}")
            inner.update(wire.PolicyKey(identity, port).pack(), _VERDICT.pack(allowed))
        policies.update(netns_key(netns_cookie), struct.pack("=i", inner.fd))


def remove_policy(policies: Map, netns_cookie: int) -> None:
    """From now on everything is refused."""
    policies.delete(netns_key(netns_cookie))


def get_policy(policies: Map, netns_cookie: int) -> tuple[int, dict[tuple[int, int], bool]] | None:
    """Generation and verdicts in force; None when there are none."""
    value = policies.lookup(netns_key(netns_cookie))
    if value is None:
        return None
    try:
        inner = Map.open_id(struct.unpack("=I", value)[0])
    except MapError:  # swapped just now
        return get_policy(policies, netns_cookie)
    generation = 0
    table: dict[tuple[int, int], bool] = {}
    with inner:
        for key, verdict in inner.items():
            if key == _GENERATION_KEY:
                (generation,) = _VERDICT.unpack(verdict)
                continue
            entry = wire.PolicyKey.unpack(key)
            table[entry.identity, entry.port] = bool(_VERDICT.unpack(verdict)[0])
    return generation, table
