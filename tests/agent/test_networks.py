"""NetworkPolicy's tables say what the one function says that judges by it."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from agent.kernel.model import Network
from agent.networks import OPEN, Compiler
from controlplane.api import NetworkPeer, NetworkPolicy, NetworkPort, NetworkRule, Workload, permits
from controlplane.api.network import Direction
from tests.agent.test_compiler import mesh, workload

BLOCKS = ("10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "0.0.0.0/0", "fd00::/8", "::/0")
PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1}
PODS = (
    workload("a", addresses=("10.1.2.3", "fd00::1"), groups=("g",), named_ports=(("http", "TCP", 8080),)),
    workload("b", addresses=("10.1.2.4",), groups=("g", "h"), named_ports=(("http", "TCP", 9090),)),
    workload("c", addresses=("192.0.2.7",), named_ports=(("dns", "UDP", 53),)),
)
#: Addresses of no pod, too.
OTHERS = {address: pod for pod in PODS for address in pod.addresses} | dict.fromkeys(
    ("10.1.9.9", "10.9.9.9", "203.0.113.1", "fd00::9", "2001:db8::1")
)

peers = st.one_of(
    st.builds(NetworkPeer, group=st.sampled_from(("g", "h", "nobody"))),
    st.builds(
        NetworkPeer,
        cidr=st.sampled_from(BLOCKS),
        excepts=st.lists(st.sampled_from(BLOCKS), max_size=2).map(tuple),
    ),
)
ports = st.one_of(
    st.builds(NetworkPort, protocol=st.sampled_from(("TCP", "UDP", "SCTP"))),
    st.builds(NetworkPort, protocol=st.sampled_from(("TCP", "UDP")), name=st.sampled_from(("http", "dns"))),
    st.builds(
        lambda protocol, first, more: NetworkPort(protocol, first, first + more if more else 0),
        st.sampled_from(("TCP", "UDP")),
        st.sampled_from((1, 53, 80, 8000, 8080)),
        st.sampled_from((0, 1, 5, 1000)),
    ),
)
rules = st.lists(
    st.builds(NetworkRule, st.lists(peers, max_size=2).map(tuple), st.lists(ports, max_size=2).map(tuple)),
    max_size=2,
).map(tuple)
policies = st.lists(
    st.builds(
        NetworkPolicy, st.just("default"), st.sampled_from("pqr"), st.none() | rules, st.none() | rules
    ),
    min_size=1,
    max_size=2,
    unique_by=lambda policy: policy.name,
)


def says(network: Network | None, address: str, protocol: int, port: int) -> bool:
    if network is None:
        return True
    asked = ipaddress.ip_address(address)
    within = [block for block in map(ipaddress.ip_network, network.classes) if asked in block]
    longest = max(within, key=lambda block: block.prefixlen, default=None)
    allowed = network.allowed[0 if longest is None else network.classes[str(longest)]]
    return any(p in (0, protocol) and first <= port <= last for p, first, last in allowed)


@given(policies, st.sampled_from(sorted(OTHERS)), st.sampled_from(sorted(PROTOCOLS)))
def test_tables_say_what_permits_says(found, address, protocol):
    this = workload(
        "this",
        network_policies=tuple(f"default/{policy.name}" for policy in found),
        named_ports=(("http", "TCP", 80), ("dns", "UDP", 53)),
    )
    compiled = Compiler(mesh(this, *PODS, *found), ()).networks(this)
    other: Workload | None = OTHERS[address]
    for direction, network in ((Direction.INGRESS, compiled.ingress), (Direction.EGRESS, compiled.egress)):
        server = this if direction is Direction.INGRESS else other
        for port in (0,) if protocol == "ICMP" else (1, 53, 80, 81, 8080, 9090, 9000, 65535):
            wanted = permits(
                found,
                direction,
                groups=other.groups if other else (),
                address=address,
                protocol=protocol,
                port=port,
                named_ports=server.named_ports if server else (),
            ).allowed
            assert says(network, address, PROTOCOLS[protocol], port) == wanted


def test_own_node_is_always_allowed():
    this = workload("this", network_policies=("default/p",))
    compiled = Compiler(mesh(this, NetworkPolicy("default", "p", (), ())), ("10.0.0.1",)).networks(this)
    assert says(compiled.ingress, "10.0.0.1", 6, 80)
    assert says(compiled.egress, "10.0.0.1", 17, 53)
    assert not says(compiled.ingress, "10.0.0.2", 6, 80)


def test_policy_that_is_missing_refuses_everything():
    this = workload("this", network_policies=("default/gone",))
    compiled = Compiler(mesh(this), ()).networks(this)
    assert not says(compiled.ingress, "10.1.2.3", 6, 80)
    assert not says(compiled.egress, "10.1.2.3", 6, 80)


def test_pod_that_no_policy_selects_is_open():
    assert Compiler(mesh(PODS[0], NetworkPolicy("default", "p", (), ())), ()).networks(PODS[0]) == OPEN
