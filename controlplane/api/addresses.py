"""Addresses and blocks of addresses as policies compare them: canonical text, each family by itself.

``::ffff:10.0.0.1`` is the IPv4 address in it; ``::/0`` is every IPv6 address and no IPv4 one, ``0.0.0.0/0`` the reverse.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache

_MAPPED = 96


def canonical_block(text: str) -> str:
    """A CIDR, or a single address, in its one form (``10.1.2.3/8`` is ``10.0.0.0/8``).

    :raises ValueError: it is none.
    """
    return str(_network(text))


def in_blocks(address: str, blocks: Iterable[str]) -> bool:
    """Whether an address is in one of these blocks.

    :raises ValueError: something is no address, or no block.
    """
    found = _address(address)
    return any(found.version == (block := _network(b)).version and found in block for b in blocks)


@lru_cache(1 << 14)
def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    network = ipaddress.ip_network(text, strict=False)
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= _MAPPED:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, network.prefixlen - _MAPPED))
    return network


@lru_cache(1 << 14)
def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
