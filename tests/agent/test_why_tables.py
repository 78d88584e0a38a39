"""``/debug/why`` where tables decide past policies, and where somebody has changed an entry: the kernel's word follows it."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator

import pytest
from msgspec import structs

from agent.passage import Stage
from bpf import checks, wire
from bpf.wire import Direction
from common.admin import BadQueryError
from controlplane.api import Action, Endpoint, MtlsMode, Service, ServicePort
from tests.agent.asking import ask, step, verdicts
from tests.agent.kernel_tables import Kernel, Node
from tests.agent.shop import ADDRESSES, OUTSIDE, PORT, VIP, mesh, policy, workload
from tests.requirements import require_root

pytestmark = pytest.mark.privileged


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    require_root()
    with Kernel() as kernel:
        yield kernel


def test_the_meshs_own_ports_are_nobodys(kernel: Kernel):
    """Where sk_lookup decides them, past every policy; and no model has another opinion."""
    ports = tuple(
        ServicePort(number, endpoints=(Endpoint("uid-server", ADDRESSES["server"], port, "n1"),))
        for number, port in ((1, wire.PORT_OUTBOUND), (2, wire.PORT_HBONE))
    )
    state = mesh(Service("shop", "odd", "odd.shop", ("10.96.0.9",), ports), mtls=MtlsMode.STRICT)
    node = Node(kernel, state)
    for source, destination, port, verdict in (
        ("host", "shop/server", 15001, "not-captured"),
        ("kubelet", "shop/server", 15002, "not-captured"),
        ("host", "shop/server", 15008, "allowed"),
        ("shop/client", "odd.shop", 1, "not-captured"),
        ("shop/client", "odd.shop", 2, "allowed"),
        ("shop/server", "odd.shop", 1, "not-captured"),
    ):
        answer = ask(node, source, destination, port)
        assert (verdicts(answer), answer["differences"]) == ({ADDRESSES["server"]: verdict}, [])
    answer = ask(node, ADDRESSES["far"], "shop/server", 15001, arrival="hbone")
    assert (verdicts(answer), answer["differences"]) == ({ADDRESSES["server"]: "own-port"}, [])
    # 0.0.0.0 is the pod's own address too; loopback is not.
    assert ask(node, "shop/client", "0.0.0.0", 15008)["reason"] == "own-port"
    assert ask(node, "shop/client", "0.0.0.0", 80)["endpoints"][0]["way"] == "plain"
    assert ask(node, "shop/client", "0.0.0.0", 15008, protocol="udp")["reason"] == ""


def test_kubelet_is_who_the_kernel_knows_as_such(kernel: Kernel):
    node = Node(kernel, mesh(mtls=MtlsMode.STRICT))
    assert verdicts(ask(node, "kubelet", "shop/server")) == {ADDRESSES["server"]: "allowed"}
    # By a service's address kube-proxy chooses, and no hook sees a pod's: plain text.
    answer = ask(node, "kubelet", "web.shop", 80)
    assert verdicts(answer)[ADDRESSES["server"]] == "policy"
    assert answer["differences"] == []
    kernel.maps["roles"].delete(struct.pack("=Q", 3))
    answer = ask(node, "kubelet", "shop/server")
    assert "no cgroup has the role PROBER" in step(answer, "source")["text"]
    assert verdicts(answer) == {ADDRESSES["server"]: "policy"}


def test_a_probe_is_in_no_block_of_addresses(kernel: Kernel):
    deny = policy("deny", Action.DENY, ip_blocks=("10.244.0.0/16",))
    node = Node(kernel, mesh(deny, policies=("shop/deny",), mtls=MtlsMode.STRICT))
    for protocol in ("tcp", "udp"):
        answer = ask(node, "kubelet", "shop/server", protocol=protocol)
        assert (verdicts(answer), answer["differences"]) == ({ADDRESSES["server"]: "allowed"}, [])
    assert verdicts(ask(node, "host", "shop/server")) == {ADDRESSES["server"]: "policy"}


#: Its backends are in a table of their own.
WEIGHTED = Service(
    "shop",
    "heavy",
    "heavy.shop",
    ("10.96.0.9",),
    (
        ServicePort(
            80,
            endpoints=(
                Endpoint("uid-server", ADDRESSES["server"], PORT, "n1", weight=2),
                Endpoint("uid-far", ADDRESSES["far"], PORT, "n2", weight=1),
            ),
        ),
    ),
)


def few(key: wire.Endpoint, address: str, port: int) -> wire.FewBackend:
    """As the agent writes a backend into its service."""
    check = checks.of_backend(checks.seed_of(key), address, port, key.protocol)
    return wire.FewBackend(address, port, key.protocol, 0, check)


def weighted(kernel: Kernel) -> wire.Service:
    with kernel.tables() as tables:
        found = tables.service(wire.Endpoint("10.96.0.9", 80))
    assert found is not None
    assert found.few == ()
    return found


def test_draws_that_hit_nothing_are_refused(kernel: Kernel):
    node = Node(kernel, mesh(WEIGHTED))
    found = weighted(kernel)
    kernel.maps["backends"].delete(wire.BackendKey(found.id, found.generation, 0).pack())
    answer = ask(node, "shop/client", "heavy.shop", 80)
    # The first slot is one half of the draws, and the other one gives a third of its own to the first.
    assert {e["reason"] or "allowed": e["share"] for e in answer["endpoints"]} == {
        "allowed": pytest.approx(65 / 81),
        "no-backend": pytest.approx(16 / 81),
    }


def test_what_does_not_prove_itself_is_not_there(kernel: Kernel):
    """The kernel may be writing the element for another service."""
    node = Node(kernel, mesh())
    key, other = wire.Endpoint(VIP, 80), wire.Endpoint("10.96.0.77", 80)
    with kernel.tables() as tables:
        found = tables.service(key)
    assert found is not None
    for wrong in ((), (few(other, "10.244.1.6", PORT),)):
        kernel.put("services", key, dataclasses.replace(found, few=(*found.few[:1], *wrong)))
        answer = ask(node, "shop/client", "web.shop", 80)
        assert {e["reason"] or "allowed": e["share"] for e in answer["endpoints"]} == {
            "allowed": pytest.approx(15 / 16),
            "no-backend": pytest.approx(1 / 16),
        }
        assert any("slot 1 is not there" in text for text in answer["differences"])
    kernel.put("services", key, dataclasses.replace(found, count=1))
    answer = ask(node, "shop/client", "web.shop", 80)
    assert answer["reason"] == "no-backend"


def test_a_backend_of_another_family_is_no_backend(kernel: Kernel):
    node = Node(kernel, mesh())
    key = wire.Endpoint(VIP, 80)
    with kernel.tables() as tables:
        found = tables.service(key)
    assert found is not None
    other = few(key, "fd00::7", PORT)
    kernel.put("services", key, dataclasses.replace(found, few=(other, *found.few[1:])))
    answer = ask(node, "shop/client", "web.shop", 80)
    assert verdicts(answer)["fd00::7"] == "no-backend"
    assert answer["differences"]


def test_who_has_no_address_of_a_family(kernel: Kernel):
    node = Node(kernel, mesh())
    for address in ("fd00::7", "fd00::8"):
        kernel.put(
            "peers", wire.pack_address(address), wire.Peer(1003, 17, wire.PEER_LOCAL | wire.PEER_ENROLLED)
        )
    assert ask(node, "shop/client", "fd00::7")["reason"] == "no-address"
    assert verdicts(ask(node, "shop/client", "fd00::7", protocol="udp")) == {"fd00::7": "no-address"}
    assert verdicts(ask(node, "shop/client", "2001:db8::9")) == {"2001:db8::9": "allowed"}
    for source in ("shop/stranger", "host", OUTSIDE):
        with pytest.raises(BadQueryError, match="no address of the family of fd00::7"):
            ask(node, source, "fd00::7")
    with pytest.raises(BadQueryError, match="no service or pod"):
        ask(node, "shop/client", "fe80::1%eth0")


def test_who_has_both_families_is_meant_by_the_address_that_was_named(kernel: Kernel):
    six = {"client": "fd00::5", "server": "fd00::7"}
    both = [structs.replace(workload(name), addresses=(ADDRESSES[name], six[name])) for name in six]
    node = Node(kernel, mesh(*both))
    for source, destination in (
        ("shop/client", six["server"]),
        (six["client"], six["server"]),
        (six["client"], "shop/server"),
    ):
        for protocol in ("tcp", "udp"):
            answer = ask(node, source, destination, protocol=protocol)
            assert (verdicts(answer), answer["differences"]) == ({six["server"]: "allowed"}, [])
            assert answer["source"]["address"] == six["client"]
    assert verdicts(ask(node, "shop/client", "shop/server")) == {ADDRESSES["server"]: "allowed"}
    with pytest.raises(BadQueryError, match="no address of the family of fd00::7"):
        ask(node, ADDRESSES["client"], six["server"])


def test_what_a_node_would_unpack_leaves_no_pod_but_for_pods(kernel: Kernel):
    node = Node(kernel, mesh())
    for port in (4789, 6081, 8472):
        for address in ("10.99.0.12", OUTSIDE):
            answer = ask(node, "shop/client", address, port, protocol="udp")
            assert (verdicts(answer), answer["differences"]) == ({address: "spoofed"}, [])
        for destination in (ADDRESSES["server"], ADDRESSES["stranger"]):
            answer = ask(node, "shop/client", destination, port, protocol="udp")
            assert verdicts(answer) == {destination: "allowed"}
        assert verdicts(ask(node, "shop/client", OUTSIDE, port)) == {OUTSIDE: "allowed"}
    assert verdicts(ask(node, "shop/stranger", OUTSIDE, 4789, protocol="udp")) == {OUTSIDE: "allowed"}


def test_a_node_proxy_refuses_whom_it_does_not_know(kernel: Kernel):
    answer = ask(Node(kernel, mesh()), "10.244.2.99", "shop/server", arrival="hbone")
    assert (verdicts(answer), answer["differences"]) == ({ADDRESSES["server"]: "policy"}, [])
    assert step(answer, "authorization")["model"] == "refused: nobody is known at 10.244.2.99"


def test_a_pod_whose_dials_are_captured_already_is_judged_as_its_peers_are(kernel: Kernel):
    """CAPTURED: plain text is not judged, and what a pod of this node dials is, as connect() asks."""
    node = Node(kernel, mesh(policy("deny", Action.DENY, "client"), policies=("shop/deny",)))
    netns = node.cookie(node.mesh.workloads["uid-server"])
    node.stages[netns] = Stage.CAPTURED
    identity = node.tables.identities["uid-server"]
    kernel.put("pods", struct.pack("=Q", netns), wire.Pod(ADDRESSES["server"], "", identity, wire.POD_OPEN))
    for source, verdict in (
        ("shop/client", "policy"),
        ("shop/other", "allowed"),
        ("shop/stranger", "allowed"),
    ):
        answer = ask(node, source, "shop/server")
        assert (verdicts(answer), answer["differences"]) == ({ADDRESSES["server"]: verdict}, [])


# An entry that somebody changed


def _verdict(node: Node) -> None:
    netns = node.cookie(node.mesh.workloads["uid-server"])
    node.kernel.policies.set_policy(netns, {(wire.IDENTITY_MESH, PORT): False}, 2, {})


def _no_policy(node: Node) -> None:
    netns = node.cookie(node.mesh.workloads["uid-server"])
    node.kernel.maps["policies"].delete(struct.pack("=Q", netns))


def _network(node: Node) -> None:
    from agent.kernel.model import Network

    netns = node.cookie(node.mesh.workloads["uid-client"])
    node.kernel.policies.set_network(netns, Direction.OUTBOUND, Network({}, {}))


def _identity(node: Node) -> None:
    netns = node.cookie(node.mesh.workloads["uid-client"])
    node.kernel.put("pods", struct.pack("=Q", netns), wire.Pod(ADDRESSES["client"], "", 999))


def _peer(node: Node) -> None:
    node.kernel.maps["peers"].delete(wire.pack_address(ADDRESSES["server"]))


def _unenrolled(node: Node) -> None:
    key = wire.pack_address(ADDRESSES["server"])
    peer = wire.Peer.unpack(node.kernel.maps["peers"].lookup(key) or b"")
    node.kernel.put("peers", key, wire.Peer(peer.netns, peer.identity, wire.PEER_LOCAL))


def _pod(node: Node) -> None:
    netns = node.cookie(node.mesh.workloads["uid-client"])
    node.kernel.maps["pods"].delete(struct.pack("=Q", netns))


def _interface(node: Node) -> None:
    netns = node.cookie(node.mesh.workloads["uid-client"])
    node.kernel.maps["interfaces"].delete(struct.pack("=I", netns))


@pytest.mark.parametrize(
    ("change", "protocol", "said"),
    [
        (_verdict, "tcp", "authorization: the kernel refuses"),
        (_no_policy, "tcp", "authorization: the kernel refuses (no-policy)"),
        (_verdict, "udp", "authorization: the kernel refuses"),
        (_network, "tcp", "egress: the kernel refuses (network-policy), the model has it allowed"),
        (_network, "udp", "egress: the kernel refuses"),
        (_identity, "tcp", "identity 999 in the kernel"),
        (_peer, "tcp", "refused by the kernel (unknown-destination)"),
        (_peer, "tcp", f"peers {ADDRESSES['server']}: the kernel has no entry"),
        (_unenrolled, "tcp", f"peers {ADDRESSES['server']}: in the mesh in the model only"),
        (_pod, "tcp", "the kernel has no entry, the model one"),
        (_interface, "udp", "no-interface"),
    ],
)
def test_a_changed_entry_is_a_difference(
    kernel: Kernel, change: Callable[[Node], None], protocol: str, said: str
):
    node = Node(kernel, mesh())
    assert ask(node, "shop/client", "shop/server", protocol=protocol)["differences"] == []
    change(node)
    answer = ask(node, "shop/client", "shop/server", protocol=protocol)
    assert any(said in text for text in answer["differences"]), answer["differences"]
    node.write()


def test_a_policy_that_the_kernel_forgot_is_a_difference(kernel: Kernel):
    node = Node(kernel, mesh(policy("deny", Action.DENY, "client"), policies=("shop/deny",)))
    netns = node.cookie(node.mesh.workloads["uid-server"])
    kernel.policies.set_policy(netns, {(wire.IDENTITY_MESH, 0): True}, 2, {})
    answer = ask(node, "shop/client", "shop/server")
    assert (verdicts(answer), answer["endpoints"][0]["model"]) == (
        {ADDRESSES["server"]: "allowed"},
        "refused",
    )
    assert "the model has it refused: AuthorizationPolicy shop/deny denies it" in answer["differences"][0]


def test_changed_services_are_differences(kernel: Kernel):
    node = Node(kernel, mesh(WEIGHTED))
    found = weighted(kernel)
    slot = wire.BackendKey(found.id, found.generation, 0)
    value = wire.Backend.unpack(kernel.maps["backends"].lookup(slot.pack()) or b"")
    check = few(wire.Endpoint("10.96.0.9", 80), "10.244.1.6", PORT).check
    kernel.put("backends", slot, dataclasses.replace(value, address="10.244.1.6", check=check))
    texts = ask(node, "shop/client", "heavy.shop", 80)["differences"]
    assert any("10.244.1.6:9000 in the kernel only" in text for text in texts)
    assert any("in the model only" in text for text in texts)
    kernel.maps["backends"].delete(slot.pack())
    texts = ask(node, "shop/client", "heavy.shop", 80)["differences"]
    assert any("slot 0 is not there" in text for text in texts)
    key = wire.Endpoint(VIP, 80)
    with kernel.tables() as tables:
        web = tables.service(key)
    assert web is not None
    other = few(key, "10.244.1.6", PORT)
    kernel.put("services", key, dataclasses.replace(web, few=(*web.few[:1], other)))
    texts = ask(node, "shop/client", "web.shop", 80)["differences"]
    assert any("10.244.1.6:9000 in the kernel only" in text for text in texts)
    kernel.maps["services"].delete(key.pack())
    texts = ask(node, "shop/client", "web.shop", 80)["differences"]
    assert texts == ["services 10.96.0.1:80/TCP: the kernel has no entry, the model has shop/web"]


def _own_peer(node: Node) -> None:
    node.kernel.maps["peers"].delete(wire.pack_address(ADDRESSES["client"]))


def _moved(node: Node) -> None:
    flags = wire.PEER_LOCAL | wire.PEER_ENROLLED
    identity = node.tables.identities["uid-client"]
    node.kernel.put("peers", wire.pack_address(ADDRESSES["client"]), wire.Peer(9, identity, flags))


def _no_role(node: Node) -> None:
    node.kernel.maps["roles"].delete(struct.pack("=Q", 1))


@pytest.mark.parametrize(
    ("change", "destination", "port", "reason"),
    [
        (_own_peer, "shop/far", PORT, "unknown-destination"),
        (_own_peer, "shop/client", PORT, "unknown-destination"),
        (_own_peer, "routed.shop", 80, "unknown-destination"),
        (_moved, "shop/far", PORT, "not-captured"),
        (_moved, "shop/client", PORT, "spoofed"),
        (_no_role, "shop/far", PORT, "own-port"),
        (_interface, "shop/far", PORT, "no-interface"),
        (_interface, "shop/server", PORT, "no-interface"),
        (_interface, OUTSIDE, 443, "no-interface"),
        (_pod, "shop/far", PORT, "not-captured"),
        (_pod, "shop/server", PORT, "spoofed"),
    ],
)
def test_what_a_changed_entry_does_to_the_clients_own_end(
    kernel: Kernel, change: Callable[[Node], None], destination: str, port: int, reason: str
):
    node = Node(kernel, mesh())
    change(node)
    answer = ask(node, "shop/client", destination, port)
    assert answer["reason"] == reason or reason in verdicts(answer).values()
    if destination != OUTSIDE:
        assert answer["differences"]


def test_a_delivery_needs_the_endpoints_veth_and_the_node_proxys_role(kernel: Kernel):
    node = Node(kernel, mesh())
    _no_role(node)
    answer = ask(node, ADDRESSES["far"], "shop/server", arrival="hbone")
    assert verdicts(answer) == {ADDRESSES["server"]: "spoofed"}
    assert answer["differences"]
    node.write()
    netns = node.cookie(node.mesh.workloads["uid-server"])
    kernel.maps["interfaces"].delete(struct.pack("=I", netns))
    answer = ask(node, ADDRESSES["far"], "shop/server", arrival="hbone")
    assert verdicts(answer) == {ADDRESSES["server"]: "no-interface"}
    for protocol in ("tcp", "udp"):
        assert verdicts(ask(node, "kubelet", "shop/server", protocol=protocol)) == {
            ADDRESSES["server"]: "no-interface"
        }
