"""Maps as text: every map has the form that its elements are read in, and verdicts read as they were written."""

from __future__ import annotations

import pytest

from agent.kernel import dump
from bpf import schema, wire
from controlplane.api import Action, NetworkPeer, NetworkPolicy, NetworkPort, NetworkRule
from tests.agent.kernel_tables import Kernel, Node
from tests.agent.shop import ADDRESSES, mesh, policy
from tests.requirements import require_root

LISTED = [spec for spec in schema.MAPS if spec.type not in dump._OPAQUE]


@pytest.mark.parametrize("spec", LISTED, ids=lambda spec: spec.name)
def test_every_map_has_a_form(spec: schema.MapSpec):
    for kind, size in zip(dump._ELEMENTS[spec.name], (spec.key_size, spec.value_size), strict=True):
        if not isinstance(kind, str):
            assert kind.LAYOUT.size == size
        shown = dump._shown(kind, bytes(size))
        assert shown is not None or kind == ""


def test_ports_are_told_as_policies_write_them():
    value = wire.network_port
    assert dump._ports(value(0, 0), 0) == "everything"
    assert dump._ports(value(6, 0), 8) == "TCP"
    assert dump._ports(value(17, 53), 24) == "UDP 53"
    assert dump._ports(value(132, 8), 21) == "SCTP 8-15"
    assert dump._ports(value(47, 0), 8) == "47"


@pytest.mark.privileged
def test_verdicts_of_a_pod():
    require_root()
    network = NetworkPolicy(
        "shop",
        "in",
        (
            NetworkRule((NetworkPeer(cidr="192.0.2.0/24"),), (NetworkPort("TCP", 8, 15),)),
            NetworkRule((NetworkPeer("clients"),)),
        ),
    )
    deny = policy("deny", Action.DENY, "client", ip_blocks=("10.244.1.0/24",))
    state = mesh(deny, network, policies=("shop/deny",), network_policies=("shop/in",))
    with Kernel() as kernel:
        node = Node(kernel, state)
        netns = node.cookie(state.workloads["uid-server"])
        numbers = {number: uid for uid, number in node.tables.identities.items()}
        shown = dump._verdicts(kernel.tables(), netns, lambda n: numbers.get(n, str(n)))
        nothing = dump._verdicts(kernel.tables(), 7, str)
    allowed = {(one["source"], tuple(one["addresses"])) for one in shown["authorization"] if one["allowed"]}
    assert ("uid-client", ()) in allowed
    assert ("uid-client", ("10.244.1.0/24",)) not in allowed
    assert ("uid-other", ("10.244.1.0/24",)) in allowed
    assert shown["generation"] == 1
    by_block = {block: one["allowed"] for one in shown["network"]["ingress"] for block in one["addresses"]}
    assert by_block["192.0.2.0/24"] == ["TCP 8-15"]
    assert by_block[f"{ADDRESSES['client']}/32"] == ["everything"]
    assert next(one for one in shown["network"]["ingress"] if one["class"] == 0)["allowed"] == []
    assert "egress" not in shown["network"]
    assert (nothing["authorization"], nothing["network"]) == (None, {})
