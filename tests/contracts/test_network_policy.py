"""Kubernetes' NetworkPolicy on the one function that both the kernel's tables and the node proxy come from."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.api import (
    Direction,
    NetworkPeer,
    NetworkPolicy,
    NetworkPort,
    NetworkRule,
    canonical_block,
    in_blocks,
    permits,
    refusing,
)

IN, OUT = Direction.INGRESS, Direction.EGRESS
ANYBODY = NetworkRule()
FRIENDS = NetworkRule((NetworkPeer("friends"),))
BLOCK = NetworkRule((NetworkPeer(cidr="10.0.0.0/8", excepts=("10.1.0.0/16", "10.2.0.0/16")),))
SIX = NetworkRule((NetworkPeer(cidr="fd00::/8", excepts=("fd00:1::/32",)),))
EVERY_FOUR, EVERY_SIX = (NetworkRule((NetworkPeer(cidr=c),)) for c in ("0.0.0.0/0", "::/0"))


def ingress(*rules: NetworkRule) -> NetworkPolicy:
    return NetworkPolicy("default", "in", tuple(rules), None)


def egress(*rules: NetworkRule) -> NetworkPolicy:
    return NetworkPolicy("default", "out", None, tuple(rules))


def ports(*found: NetworkPort) -> NetworkRule:
    return NetworkRule((), tuple(found))


@pytest.mark.parametrize(
    ("policies", "direction", "other", "allowed"),
    [
        # not selected: not isolated
        ([], IN, {}, True),
        ([], OUT, {}, True),
        # isolated in the direction that is spoken of, and in no other
        ([ingress()], IN, {}, False),
        ([ingress()], OUT, {}, True),
        ([egress()], OUT, {}, False),
        ([egress()], IN, {}, True),
        ([NetworkPolicy("default", "both", (), ())], OUT, {}, False),
        ([NetworkPolicy("default", "none", None, None)], IN, {}, True),
        # allow all
        ([ingress(ANYBODY)], IN, {"address": None}, True),
        # policies add up, and so do rules, peers and ports
        ([ingress(), ingress(ANYBODY)], IN, {}, True),
        ([ingress(FRIENDS), ingress(BLOCK)], IN, {"address": "10.9.0.1"}, True),
        ([ingress(FRIENDS, BLOCK)], IN, {"groups": ("friends",), "address": "192.0.2.1"}, True),
        ([ingress(FRIENDS, BLOCK)], IN, {"groups": ("others",), "address": "192.0.2.1"}, False),
        # blocks: with exceptions, of pods too, each family by itself
        ([ingress(BLOCK)], IN, {"address": "10.1.2.3"}, False),
        ([ingress(BLOCK)], IN, {"address": "10.3.2.3", "groups": ("others",)}, True),
        ([ingress(BLOCK)], IN, {"address": "::ffff:10.3.2.3"}, True),
        ([ingress(BLOCK)], IN, {"address": "::ffff:10.2.2.3"}, False),
        ([ingress(BLOCK)], IN, {"address": "fd00::1"}, False),
        ([ingress(SIX)], IN, {"address": "fd12::1"}, True),
        ([ingress(SIX)], IN, {"address": "fd00:1::1"}, False),
        ([ingress(EVERY_FOUR)], IN, {"address": "2001:db8::1"}, False),
        ([ingress(EVERY_SIX)], IN, {"address": "192.0.2.1"}, False),
        ([ingress(EVERY_SIX)], IN, {"address": "2001:db8::1"}, True),
        # an exception in one policy takes nothing from another
        ([ingress(BLOCK), ingress(EVERY_FOUR)], IN, {"address": "10.1.2.3"}, True),
        # an address that is not known is in no block
        ([ingress(EVERY_FOUR, EVERY_SIX)], IN, {"address": None}, False),
        # ports
        ([ingress(ports(NetworkPort("TCP", 80)))], IN, {}, True),
        ([ingress(ports(NetworkPort("TCP", 80)))], IN, {"port": 81}, False),
        ([ingress(ports(NetworkPort("TCP", 80)))], IN, {"protocol": "UDP"}, False),
        ([ingress(ports(NetworkPort("TCP", 79, 81)))], IN, {}, True),
        ([ingress(ports(NetworkPort("TCP", 79, 81)))], IN, {"port": 82}, False),
        ([ingress(ports(NetworkPort("UDP")))], IN, {"protocol": "UDP", "port": 5}, True),
        ([ingress(ports(NetworkPort("UDP")))], IN, {}, False),
        ([ingress(ports(NetworkPort("TCP", 443), NetworkPort("TCP", 80)))], IN, {}, True),
        # both, peers and ports, have to match in one rule
        ([ingress(FRIENDS, ports(NetworkPort("TCP", 81)))], IN, {}, False),
        # named ports are the destination's, and of its protocol
        ([ingress(ports(NetworkPort(name="web")))], IN, {"named_ports": (("web", "TCP", 80),)}, True),
        ([ingress(ports(NetworkPort(name="web")))], IN, {"named_ports": (("web", "UDP", 80),)}, False),
        ([egress(ports(NetworkPort(name="web")))], OUT, {"named_ports": (("web", "TCP", 81),)}, False),
        ([egress(ports(NetworkPort(name="web")))], OUT, {}, False),
        # what has no ports: by rules without any only
        ([ingress(ANYBODY)], IN, {"protocol": "ICMP", "port": 0}, True),
        ([ingress(ports(NetworkPort("TCP")))], IN, {"protocol": "ICMP", "port": 0}, False),
    ],
)
def test_verdicts(
    policies: list[NetworkPolicy], direction: Direction, other: dict[str, Any], allowed: bool
) -> None:
    end: dict[str, Any] = {"groups": (), "address": "192.0.2.1", "protocol": "TCP", "port": 80} | other
    assert permits(policies, direction, **end).allowed is allowed


def test_the_verdict_names_the_policy() -> None:
    end: dict[str, Any] = {"groups": ("friends",), "address": None, "protocol": "TCP", "port": 80}
    first, second = ingress(), NetworkPolicy("default", "second", (FRIENDS,))
    assert permits([first, second], IN, **end).policy == "default/second"
    assert permits([first], IN, **end).policy == "default/in"
    assert permits([], IN, **end).policy == ""


def test_a_policy_that_is_not_there_refuses() -> None:
    end: dict[str, Any] = {"groups": (), "address": "10.0.0.1", "protocol": "TCP", "port": 80}
    missing = refusing("default/gone")
    for direction in Direction:
        verdict = permits([missing], direction, **end)
        assert (verdict.allowed, verdict.policy) == (False, "default/gone")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("10.1.2.3", "10.1.2.3/32"),
        ("FD00::1", "fd00::1/128"),
        ("::ffff:10.1.2.3", "10.1.2.3/32"),
        ("::ffff:10.1.2.3/104", "10.0.0.0/8"),
        ("::/0", "::/0"),
    ],
)
def test_blocks_have_one_form(text: str, canonical: str) -> None:
    assert canonical_block(text) == canonical
    assert canonical_block(canonical) == canonical


def test_what_is_no_address_is_no_verdict() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        in_blocks("nowhere", ("10.0.0.0/8",))
    with pytest.raises(ValueError, match="nowhere"):
        in_blocks("10.0.0.1", ("nowhere",))
    assert not in_blocks("10.0.0.1", ())
