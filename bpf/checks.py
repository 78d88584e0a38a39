"""Check words of services and backends: what a program reads proves whose it is (``struct service`` in bpf/wire.h)."""

from __future__ import annotations

import struct

from bpf.wire import CHECK_FOLD, CHECK_PRIME, CHECK_SEED, Endpoint, Service

_WORDS = struct.Struct("=IIIIHBx")
_U32 = 0xFFFFFFFF


def seed_of(key: Endpoint) -> int:
    """What the checks of a service, and of all that is its, begin with."""
    return _mixed(CHECK_SEED, _words(key))


def of_backend(seed: int, address: str, port: int, protocol: int) -> int:
    """:param seed: its service's."""
    return _mixed(seed, _words(Endpoint(address, port, protocol)))


def of_service(seed: int, service: Service) -> int:
    return _mixed(seed, (service.id, service.generation, service.count, service.flags))


def _words(endpoint: Endpoint) -> tuple[int, ...]:
    *address, port, protocol = _WORDS.unpack(endpoint.pack())
    return (*address, protocol << 16 | port)


def _mixed(value: int, words: tuple[int, ...]) -> int:
    for word in words:
        value = (value ^ word) * CHECK_PRIME & _U32
        value ^= value >> CHECK_FOLD
    return value
