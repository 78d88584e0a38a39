"""The maps that the programs share: name, type, sizes. How much each may hold can be set when they are made."""

from __future__ import annotations

from typing import NamedTuple

from bpf import maps, wire


class MapSpec(NamedTuple):
    """Sizes of keys and values in bytes, of the map in elements (bytes for the ring buffer).

    ``layout`` counts the forms that its elements have had; it rises with MYCEL_ABI when that changes this map's. The kernel's
    name of the map tells it to other versions of the programs (:mod:`bpf.succession`).
    """

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0
    layout: int = 1

    @property
    def kernel_name(self) -> str:
        """At most 15 characters."""
        return self.name if self.layout == 1 else f"{self.name}.{self.layout}"

    def has_form_of(self, one: maps.Map) -> bool:
        """Whether the elements of a map of any version mean the same."""
        found = (one.info.name, one.info.type, one.key_size, one.value_size)
        return found == (self.kernel_name, self.type, self.key_size, self.value_size)


#: Of the inner maps of ``policies``: each is made with the size that its table needs.
INNER_POLICY = MapSpec("policy", maps.HASH, wire.PolicyKey.LAYOUT.size, 4, 64, maps.F_NO_PREALLOC)
#: The same of ``networks``.
INNER_NETWORK = MapSpec("network", maps.LPM_TRIE, wire.NetworkKey.LAYOUT.size, 4, 64, maps.F_NO_PREALLOC)

#: What the elements of a map in map are made as.
INNER = {"policies": INNER_POLICY, "networks": INNER_NETWORK}

# Elements are allocated when they come (NO_PREALLOC): a map that is large enough costs nothing while it is empty.
MAPS = (
    MapSpec("roles", maps.HASH, 8, 4, 256, maps.F_NO_PREALLOC),
    MapSpec("pods", maps.HASH, 8, wire.Pod.LAYOUT.size, 1024, maps.F_NO_PREALLOC, 2),
    MapSpec("peers", maps.HASH, wire.ADDRESS.size, wire.Peer.LAYOUT.size, 262144, maps.F_NO_PREALLOC, 2),
    MapSpec(
        "services",
        maps.HASH,
        wire.Endpoint.LAYOUT.size,
        wire.Service.LAYOUT.size,
        65536,
        maps.F_NO_PREALLOC,
        2,
    ),
    MapSpec(
        "backends",
        maps.HASH,
        wire.BackendKey.LAYOUT.size,
        wire.Backend.LAYOUT.size,
        524288,
        maps.F_NO_PREALLOC,
        2,
    ),
    MapSpec("members", maps.HASH, wire.MemberKey.LAYOUT.size, 4, 524288, maps.F_NO_PREALLOC, 2),
    MapSpec("affinity", maps.LRU_HASH, wire.AffinityKey.LAYOUT.size, wire.Affinity.LAYOUT.size, 65536, 0, 2),
    MapSpec("datagrams", maps.LRU_HASH, wire.DATAGRAM_KEY_SIZE, wire.Endpoint.LAYOUT.size, 32768),
    MapSpec("udp_sockets", maps.SK_STORAGE, 4, wire.DATAGRAM_SOCKET_SIZE, 0, maps.F_NO_PREALLOC),
    MapSpec("policies", maps.HASH_OF_MAPS, 8, 4, 1024, maps.F_NO_PREALLOC, 2),
    MapSpec("classes", maps.LPM_TRIE, wire.ClassKey.LAYOUT.size, 4, 65536, maps.F_NO_PREALLOC),
    MapSpec("networks", maps.HASH_OF_MAPS, wire.NetworkOf.LAYOUT.size, 4, 2048, maps.F_NO_PREALLOC),
    MapSpec("interfaces", maps.HASH, 4, wire.Interface.LAYOUT.size, 1024, maps.F_NO_PREALLOC),
    MapSpec("talks", maps.LRU_HASH, wire.TalkKey.LAYOUT.size, wire.Talk.LAYOUT.size, 65536),
    MapSpec(
        "connecting", maps.HASH, wire.Tuple.LAYOUT.size, wire.Who.LAYOUT.size, 65536, maps.F_NO_PREALLOC, 2
    ),
    MapSpec(
        "captured",
        maps.HASH,
        wire.CapturedKey.LAYOUT.size,
        wire.Captured.LAYOUT.size,
        262144,
        maps.F_NO_PREALLOC,
        2,
    ),
    MapSpec("shares", maps.HASH, 8, wire.Share.LAYOUT.size, 1024, maps.F_NO_PREALLOC),
    MapSpec("listeners", maps.SOCKHASH, wire.Endpoint.LAYOUT.size, 8, 4096, 0, 2),
    MapSpec(
        "flows", maps.HASH, wire.FlowKey.LAYOUT.size, wire.Flow.LAYOUT.size, 131072, maps.F_NO_PREALLOC, 2
    ),
    MapSpec(
        "refused",
        maps.HASH,
        wire.FlowKey.LAYOUT.size,
        wire.Refusals.LAYOUT.size,
        16384,
        maps.F_NO_PREALLOC,
        2,
    ),
    MapSpec(
        "conversations",
        maps.HASH,
        wire.ConversationKey.LAYOUT.size,
        wire.Conversation.LAYOUT.size,
        65536,
        maps.F_NO_PREALLOC,
    ),
    MapSpec("records", maps.RINGBUF, 0, 0, 1 << 20),
    MapSpec("recent", maps.LRU_HASH, wire.Refusal.LAYOUT.size, 8, 8192, 0, 2),
    MapSpec("closed", maps.ARRAY, 4, wire.Closed.LAYOUT.size, wire.CLOSED_SLOTS),
    MapSpec("counters", maps.ARRAY, 4, 8, wire.COUNTERS, 0, 2),
    MapSpec("events", maps.RINGBUF, 0, 0, 1 << 18, 0, 2),
    MapSpec("splices", maps.HASH, 8, wire.SPLICE_SIZE, 65536, maps.F_NO_PREALLOC),
    MapSpec("splice_sockets", maps.SOCKHASH, 8, 8, 131072),
    MapSpec("splice_ends", maps.SK_STORAGE, 4, wire.SPLICE_END_SIZE, 0, maps.F_NO_PREALLOC),
    MapSpec("splice_programs", maps.PROG_ARRAY, 4, 4, 1),
    MapSpec("splice_counters", maps.ARRAY, 4, 8, len(wire.SpliceCounter)),
    MapSpec("splice_wakes", maps.RINGBUF, 0, 0, 4096),
    MapSpec("sockets", maps.SK_STORAGE, 4, wire.SOCKET_STATE_SIZE, 0, maps.F_NO_PREALLOC, 2),
)

#: Accounts of what has no room in ``flows`` and ``refused``: always there, by protocol and direction.
OVERFLOW_KEYS = {
    table: tuple(
        wire.FlowKey(0, 0, 0, 0, 0, verdict, protocol, direction, 0)
        for protocol in protocols
        for direction in wire.Direction
    )
    for table, verdict, protocols in (
        ("flows", wire.VERDICT_ALLOWED, (wire.PROTOCOL_TCP, wire.PROTOCOL_UDP)),
        # Of others it is only counted what was refused.
        ("refused", wire.VERDICT_SEVERAL, (wire.PROTOCOL_TCP, wire.PROTOCOL_UDP, 0)),
    )
}
