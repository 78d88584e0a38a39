"""``/debug/why`` over real maps: what the kernel's tables say, what the policies say, and that a difference is found."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.mesh import Mesh
from agent.passage import Stage
from bpf import wire
from common.admin import BadQueryError
from controlplane.api import (
    Action,
    Authorization,
    Endpoint,
    MtlsMode,
    NetworkPeer,
    NetworkPolicy,
    NetworkPort,
    NetworkRule,
    Operation,
    Rule,
    Service,
    ServicePort,
    Source,
)
from tests.agent.asking import ask, step, verdicts
from tests.agent.kernel_tables import Kernel, Node
from tests.agent.shop import ADDRESSES, OUTSIDE, PORT, VIP, mesh, policy
from tests.requirements import require_root

pytestmark = pytest.mark.privileged


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    require_root()
    with Kernel() as kernel:
        yield kernel


def test_a_connection_on_one_node(kernel: Kernel):
    answer = ask(Node(kernel, mesh()), "shop/client", "shop/server")
    (endpoint,) = answer["endpoints"]
    assert (endpoint["kernel"], endpoint["model"], endpoint["way"]) == ("allowed", "allowed", "direct")
    assert (endpoint["pod"], endpoint["node"], endpoint["splice"]) == ("shop/server", "n1", True)
    assert [one["step"] for one in answer["steps"]] == ["source", "service"]
    assert [one["step"] for one in endpoint["steps"]] == [
        *("peer", "egress", "way", "authorization", "ingress", "splice"),
    ]
    assert (
        "shop/client (" in step(answer, "authorization")["text"]
        or "any workload" in step(answer, "authorization")["text"]
    )
    assert answer["differences"] == []


def test_a_pod_is_meant_by_any_of_its_names(kernel: Kernel):
    node = Node(kernel, mesh())
    for name in ("shop/client", "client.shop", "client", "uid-client", ADDRESSES["client"]):
        answer = ask(node, name, f"::ffff:{ADDRESSES['server']}")
        assert answer["source"]["pod"] == "shop/client"
        assert verdicts(answer) == {ADDRESSES["server"]: "allowed"}
    for name in ("web.shop", "web.shop.svc", "web.shop.svc.cluster.local", "web", VIP):
        assert set(verdicts(ask(node, "client", name, 80))) == {ADDRESSES["server"], ADDRESSES["far"]}
        assert ask(node, "client", name, 80)["destination"]["service"] == "shop/web"
    assert ask(node, "client", "web.shop", "web")["destination"]["port"] == 80


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"source": "shop/nobody"}, "source shop/nobody: no pod of that name"),
        ({"source": "shop/clien"}, "there is shop/client"),
        ({"source": VIP}, "is the address of service shop/web"),
        ({"destination": "nothing.shop"}, "destination nothing.shop: no service or pod"),
        ({"destination": "headless.shop"}, "is headless: name one of its endpoints"),
        ({"destination": "web.shop", "port": "metrics"}, "port metrics: no number"),
        ({"port": "70000"}, "port 70000: not from 1 to 65535"),
        ({"port": ""}, "port: is missing"),
        ({"protocol": "sctp"}, "protocol=sctp: neither tcp nor udp"),
        ({"arrival": "soon"}, "arrival=soon"),
        ({"colour": "red"}, "colour: no such parameter"),
        ({"node": "n2"}, "source shop/client: is on node n1, not on n2"),
    ],
)
def test_a_bad_question_is_answered_with_what_is_wrong(kernel: Kernel, query: dict[str, str], said: str):
    node = Node(kernel, mesh())
    with pytest.raises(BadQueryError) as error:
        ask(node, **{"source": "shop/client", "destination": "shop/server", **query})
    assert said in str(error.value)


def test_another_nodes_pod_is_asked_about_there(kernel: Kernel):
    assert ask(Node(kernel, mesh()), "shop/far", "shop/server") == {"node": "n1", "elsewhere": "n2"}
    assert ask(Node(kernel, mesh()), OUTSIDE, "shop/far") == {"node": "n1", "elsewhere": "n2"}


def test_a_service_has_a_branch_for_each_endpoint(kernel: Kernel):
    answer = ask(Node(kernel, mesh()), "shop/client", "web.shop", 80)
    near, far = answer["endpoints"]
    assert (near["way"], near["remote"], near["share"]) == ("direct", False, 0.5)
    assert (far["way"], far["remote"], far["share"], far["node"]) == ("captured:15001", True, 0.5, "n2")
    assert "2 slots" in step(answer, "service")["text"]
    assert answer["differences"] == []


def test_weights_are_shares_of_the_draws(kernel: Kernel):
    ends = tuple(
        Endpoint(f"uid-{n}", ADDRESSES[n], PORT, "n1", weight=w) for n, w in (("server", 9), ("other", 1))
    )
    weighed = Service("shop", "weighed", "weighed.shop", ("10.96.0.9",), (ServicePort(80, endpoints=ends),))
    answer = ask(Node(kernel, mesh(weighed)), "shop/client", "10.96.0.9", 80)
    assert {e["address"]: e["share"] for e in answer["endpoints"]} == {
        ADDRESSES["server"]: pytest.approx(0.9, abs=1e-6),
        ADDRESSES["other"]: pytest.approx(0.1, abs=1e-6),
    }
    assert "by weight" in step(answer, "endpoints")["text"]
    assert answer["differences"] == []


def test_affinity_keeps_the_endpoint_that_the_pod_had(kernel: Kernel):
    import time

    ends = tuple(Endpoint(f"uid-{n}", ADDRESSES[n], PORT, "n1") for n in ("server", "other"))
    sticky = Service("shop", "sticky", "sticky.shop", ("10.96.0.9",), (ServicePort(80, endpoints=ends),), 60)
    node = Node(kernel, mesh(sticky))
    assert len(ask(node, "shop/client", "10.96.0.9", 80)["endpoints"]) == 2
    with node.kernel.tables() as tables:
        found = tables.service(wire.Endpoint("10.96.0.9", 80))
    assert found is not None
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    key = wire.AffinityKey(1001, found.id)

    def had(address: str, seconds_ago: int) -> None:
        used = now - seconds_ago * 10**9
        kernel.put("affinity", key, wire.Affinity(address, PORT, 6, 0, 0, used))

    had(ADDRESSES["other"], 1)
    assert verdicts(ask(node, "shop/client", "10.96.0.9", 80)) == {ADDRESSES["other"]: "allowed"}
    had(ADDRESSES["other"], 61)
    assert len(ask(node, "shop/client", "10.96.0.9", 80)["endpoints"]) == 2
    had(ADDRESSES["far"], 1)  # none of its endpoints (any more)
    assert len(ask(node, "shop/client", "10.96.0.9", 80)["endpoints"]) == 2


def test_node_ports_and_services_without_endpoints(kernel: Kernel):
    empty = Service("shop", "empty", "empty.shop", ("10.96.0.8",), (ServicePort(80),))
    node = Node(kernel, mesh(empty))
    answer = ask(node, "shop/client", "10.99.0.12", 30080)
    assert set(verdicts(answer)) == {ADDRESSES["server"], ADDRESSES["far"]}
    assert "node port" in step(answer, "service")["text"]
    assert answer["differences"] == []
    answer = ask(node, "shop/client", "empty.shop", 80)
    assert (answer["reason"], answer["endpoints"], answer["differences"]) == ("no-backend", [], [])


def test_l7_goes_by_l7proxy_and_each_endpoint_is_judged(kernel: Kernel):
    deny = policy("deny", Action.DENY, "client")
    node = Node(kernel, mesh(deny, policies=("shop/deny",)))
    answer = ask(node, "shop/client", "routed.shop", 80)
    assert step(answer, "way", 1)["text"].startswith("l7proxy hands it to the node proxy")
    assert "15002" in answer["steps"][-1]["text"]
    assert verdicts(answer) == {ADDRESSES["server"]: "policy", ADDRESSES["far"]: "allowed"}
    assert answer["differences"] == []


def test_l7proxy_is_never_kept_from_the_pod_that_it_dials_for(kernel: Kernel):
    policies = {"policies": ("shop/nothing",), "network_policies": ("shop/in", "shop/out")}
    node = Node(kernel, mesh(Authorization("shop", "nothing", Action.ALLOW), INGRESS, EGRESS, **policies))
    answer = ask(node, "shop/server", "routed.shop", 80)
    assert verdicts(answer) == {ADDRESSES["server"]: "allowed", ADDRESSES["far"]: "network-policy"}
    assert answer["endpoints"][0]["way"] == "self"
    assert answer["differences"] == []


def test_our_own_ports_and_the_pod_itself(kernel: Kernel):
    node = Node(kernel, mesh())
    assert ask(node, "shop/client", "shop/server", 15008)["reason"] == "own-port"
    answer = ask(node, "shop/client", "shop/client")
    assert (answer["endpoints"][0]["way"], verdicts(answer)) == ("self", {ADDRESSES["client"]: "allowed"})
    assert ask(node, "shop/client", "127.0.0.1", 15008)["endpoints"][0]["way"] == "plain"
    answer = ask(node, "shop/client", OUTSIDE, 443)
    assert (answer["endpoints"][0]["way"], verdicts(answer)) == ("plain", {OUTSIDE: "allowed"})


ALLOW_OTHER = policy("allow-other", Action.ALLOW, "other")


@pytest.mark.parametrize(
    ("policies", "expected", "named"),
    [
        pytest.param(
            (ALLOW_OTHER,), {"client": "policy", "other": "allowed"}, ["shop/allow-other"], id="allow"
        ),
        pytest.param(
            (policy("deny", Action.DENY, "client"),),
            {"client": "policy", "other": "allowed"},
            ["shop/deny"],
            id="deny",
        ),
        pytest.param(
            (policy("port", Action.DENY, ports=(PORT,)),),
            {"client": "policy", "other": "policy"},
            ["shop/port"],
            id="port",
        ),
        pytest.param(
            (policy("block", Action.DENY, ip_blocks=(f"{ADDRESSES['client']}/32",)),),
            {"client": "policy", "other": "allowed"},
            ["shop/block"],
            id="address",
        ),
        pytest.param(
            (Authorization("shop", "nothing", Action.ALLOW),),
            {"client": "policy", "other": "policy"},
            ["shop/nothing"],
            id="allow-nothing",
        ),
    ],
)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_authorization_names_the_policy(
    kernel: Kernel,
    policies: tuple[Authorization, ...],
    expected: dict[str, str],
    named: list[str],
    protocol: str,
):
    node = Node(kernel, mesh(*policies, policies=tuple(f"shop/{p.name}" for p in policies)))
    for who, verdict in expected.items():
        answer = ask(node, f"shop/{who}", "shop/server", protocol=protocol)
        assert verdicts(answer) == {ADDRESSES["server"]: verdict}
        assert answer["differences"] == []
        if verdict != "allowed":
            judged = step(answer, "authorization")
            if policies[0].name == "block":
                assert f"address in {ADDRESSES['client']}/32" in judged["text"]
            assert (judged["refused"], judged["policies"]) == ("policy", named)
            assert judged["model"].startswith("refused: ")
            assert answer["endpoints"][0]["policies"] == named


def test_plain_text_by_mode(kernel: Kernel):
    node = Node(kernel, mesh(mtls=MtlsMode.STRICT, port_mtls=((PORT, MtlsMode.PERMISSIVE),)))
    for source in ("shop/stranger", OUTSIDE, "host"):
        for protocol in ("tcp", "udp"):
            assert verdicts(ask(node, source, "shop/server", protocol=protocol)) == {
                ADDRESSES["server"]: "allowed"
            }
            answer = ask(node, source, "shop/server", 80, protocol=protocol)
            assert verdicts(answer) == {ADDRESSES["server"]: "policy"}
            assert "STRICT" in step(answer, "authorization")["model"]
            assert answer["differences"] == []
    answer = ask(node, "kubelet", "shop/server", 80)
    assert (verdicts(answer), answer["differences"]) == ({ADDRESSES["server"]: "allowed"}, [])


def test_plain_text_from_an_address_of_the_mesh_is_spoofed(kernel: Kernel):
    answer = ask(Node(kernel, mesh()), "shop/far", "shop/server", arrival="plain")
    assert (verdicts(answer), answer["differences"]) == ({ADDRESSES["server"]: "spoofed"}, [])


INGRESS = NetworkPolicy("shop", "in", (NetworkRule((NetworkPeer("clients"),), (NetworkPort("TCP", PORT),)),))
EGRESS = NetworkPolicy(
    "shop",
    "out",
    egress=(NetworkRule((NetworkPeer(cidr="10.244.1.0/24"),), (NetworkPort("UDP", 9000, 9001),)),),
)


def test_network_policy_in_both_directions(kernel: Kernel):
    node = Node(
        kernel, mesh(INGRESS, EGRESS, network_policies=("shop/in",), client_network_policies=("shop/out",))
    )
    answer = ask(node, "shop/other", "shop/server")
    assert verdicts(answer) == {ADDRESSES["server"]: "network-policy"}
    assert (step(answer, "ingress")["policies"], answer["differences"]) == (["shop/in"], [])
    answer = ask(node, "shop/client", "shop/server")
    assert verdicts(answer) == {ADDRESSES["server"]: "network-policy"}
    assert (step(answer, "egress")["policies"], answer["differences"]) == (["shop/out"], [])
    # The port is allowed by UDP at this end and by TCP at that one.
    answer = ask(node, "shop/client", "shop/server", protocol="udp")
    assert "refused" not in step(answer, "egress")
    assert step(answer, "ingress")["refused"] == "network-policy"
    answer = ask(node, "shop/client", "shop/other", 9001, protocol="udp")
    assert (verdicts(answer), answer["differences"]) == ({ADDRESSES["other"]: "allowed"}, [])
    # A node and its own pods may always speak.
    for protocol in ("tcp", "udp"):
        answer = ask(node, "host", "shop/server", 80, protocol=protocol)
        assert (verdicts(answer), answer["differences"]) == ({ADDRESSES["server"]: "allowed"}, [])


def test_what_comes_by_hbone_is_judged_by_the_node_proxy(kernel: Kernel):
    node = Node(kernel, mesh(policy("deny", Action.DENY, "far", ports=(80,)), policies=("shop/deny",)))
    assert verdicts(ask(node, ADDRESSES["far"], "shop/server", arrival="hbone")) == {
        ADDRESSES["server"]: "allowed"
    }
    answer = ask(node, ADDRESSES["far"], "shop/server", 80, arrival="hbone")
    assert verdicts(answer) == {ADDRESSES["server"]: "policy"}
    assert answer["endpoints"][0]["policies"] == ["shop/deny"]
    kernel.maps["listeners"].delete(wire.Endpoint(ADDRESSES["server"], wire.PORT_HBONE).pack())
    answer = ask(node, ADDRESSES["far"], "shop/server", arrival="hbone")
    assert verdicts(answer) == {ADDRESSES["server"]: "no-listener"}
    assert answer["differences"]


def test_why_a_connection_is_not_spliced(kernel: Kernel):
    node = Node(kernel, mesh(splice=False))
    answer = ask(node, "shop/client", "shop/server")
    assert (answer["endpoints"][0]["splice"], answer["differences"]) == (False, [])
    assert "server's pod" in step(answer, "splice")["text"]
    assert "client's pod" in step(ask(node, "shop/server", "shop/client"), "splice")["text"]
    kernel.put("splice_counters", struct.pack("=I", 0), struct.pack("=Q", 1))
    assert "switched off on this node" in step(ask(node, "shop/client", "shop/other"), "splice")["text"]


def test_a_pod_on_its_way_in_is_no_difference(kernel: Kernel):
    node = Node(kernel, mesh(mtls=MtlsMode.STRICT))
    netns = node.cookie(node.mesh.workloads["uid-server"])
    identity = node.tables.identities["uid-server"]
    node.stages[netns] = Stage.PREPARED
    flags = wire.POD_PASSING | wire.POD_OPEN
    kernel.put("pods", struct.pack("=Q", netns), wire.Pod(ADDRESSES["server"], "", identity, flags))
    joining = wire.PEER_LOCAL | wire.PEER_ENROLLED | wire.PEER_JOINING
    kernel.put("peers", wire.pack_address(ADDRESSES["server"]), wire.Peer(netns, identity, joining))
    answer = ask(node, "shop/stranger", "shop/server")
    assert (verdicts(answer), answer["differences"]) == ({ADDRESSES["server"]: "allowed"}, [])
    assert "not judged" in step(answer, "way")["text"]
    answer = ask(node, "shop/server", "shop/other")
    assert "without a mesh" in step(answer, "source")["text"]


def policies_of_all_kinds() -> st.SearchStrategy[Mesh]:
    """What a server may have, of AuthorizationPolicy, NetworkPolicy and mTLS mode."""
    blocks = st.lists(st.sampled_from(["10.244.1.0/24", "10.244.1.5/32", "0.0.0.0/0"]), max_size=1).map(tuple)
    sources = st.builds(
        Source,
        principals=st.lists(
            st.sampled_from([f"cluster.local/ns/shop/sa/{n}" for n in ("client", "other")]), max_size=1
        ).map(tuple),
        ip_blocks=blocks,
        not_ip_blocks=blocks,
    )
    operations = st.builds(Operation, ports=st.sampled_from([(), (PORT,), (80,)]))
    rules = st.builds(
        Rule, st.lists(sources, max_size=2).map(tuple), st.lists(operations, max_size=1).map(tuple)
    )
    authorizations = st.lists(
        st.tuples(st.sampled_from(Action), st.lists(rules, max_size=2).map(tuple)), max_size=2
    )
    peers = st.sampled_from(
        [NetworkPeer("clients"), NetworkPeer(cidr="10.244.1.0/24", excepts=("10.244.1.6/32",))]
    )
    ports = st.sampled_from([NetworkPort("TCP", PORT), NetworkPort("UDP"), NetworkPort("TCP", 1, 100)])
    network_rules = st.builds(
        NetworkRule, st.lists(peers, max_size=2).map(tuple), st.lists(ports, max_size=2).map(tuple)
    )
    networks = st.none() | st.lists(network_rules, max_size=2).map(tuple)

    def made(
        found: list[tuple[Action, tuple[Rule, ...]]],
        ingress: tuple[NetworkRule, ...] | None,
        egress: tuple[NetworkRule, ...] | None,
        mtls: MtlsMode,
    ) -> Mesh:
        authorized = [
            Authorization("shop", f"a{n}", action, rules) for n, (action, rules) in enumerate(found)
        ]
        return mesh(
            *authorized,
            NetworkPolicy("shop", "n", ingress, egress),
            policies=tuple(f"shop/{one.name}" for one in authorized),
            network_policies=("shop/n",),
            client_network_policies=("shop/n",),
            mtls=mtls,
        )

    return st.builds(made, authorizations, networks, networks, st.sampled_from(MtlsMode))


@settings(max_examples=15, deadline=None)
@given(policies_of_all_kinds())
def test_tables_and_policies_never_differ(state: Mesh):
    require_root()
    with Kernel() as kernel:
        node = Node(kernel, state)
        for source in ("shop/client", "shop/other", "shop/stranger", OUTSIDE, "host"):
            for port in (PORT, 80):
                for protocol in ("tcp", "udp"):
                    answer = ask(node, source, "shop/server", port, protocol=protocol)
                    assert answer["differences"] == []
