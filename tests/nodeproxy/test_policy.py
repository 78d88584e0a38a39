"""Policy for what arrives by HBONE: verdicts, and what a change of them does to open tunnels."""

import time

import msgspec
import pytest

from controlplane.api import (
    Action,
    Authorization,
    NetworkPeer,
    NetworkPolicy,
    NetworkPort,
    NetworkRule,
    Operation,
    Rule,
    Source,
)
from tests.nodeproxy.fakes.apps import Server, echo
from tests.nodeproxy.fakes.world import World

CLIENT = "cluster.local/ns/default/sa/client"


@pytest.fixture
def server(world: World):
    made = Server(world.server_address, echo)
    yield made
    made.close()


def set_policies(world: World, *policies: Authorization) -> None:
    world.policies = {p.name: p for p in policies}
    keys = tuple(f"{p.namespace}/{p.name}" for p in policies)
    old = world.workloads["uid-server"]
    world.workloads["uid-server"] = msgspec.structs.replace(old, policies=keys)
    world.publish(world.b)


def passes(world: World, port: int) -> bool:
    try:
        with world.dial(port) as sock:
            sock.sendall(b"x")
            return sock.recv(1) == b"x"
    except (ConnectionResetError, BrokenPipeError):  # maybe before connect() has told of its success
        return False


def allow(*principals: str, ports: tuple[int, ...] = ()) -> Authorization:
    operations = (Operation(ports=ports),) if ports else ()
    return Authorization(
        "default", "allow", Action.ALLOW, (Rule((Source(principals=principals),), operations),)
    )


def deny(*principals: str) -> Authorization:
    return Authorization("default", "deny", Action.DENY, (Rule((Source(principals=principals),)),))


def test_verdicts(world: World, server: Server):
    set_policies(world, allow(CLIENT))
    assert passes(world, server.port)
    set_policies(world, allow("cluster.local/ns/default/sa/other"))
    assert not passes(world, server.port)
    set_policies(world, allow(CLIENT, ports=(server.port,)))
    assert passes(world, server.port)
    set_policies(world, allow(CLIENT, ports=(server.port + 1,)))
    assert not passes(world, server.port)
    set_policies(world, allow(CLIENT), deny("*"))
    assert not passes(world, server.port)
    set_policies(world, Authorization("default", "nothing", Action.ALLOW))
    assert not passes(world, server.port)
    flags = {labels.response_flags for labels in world.b.proxy.accounting.snapshot()}
    assert flags == {"-", "DENY"}
    assert {labels.response_flags for labels in world.a.proxy.accounting.snapshot()} == {"-", "DENY"}


@pytest.mark.parametrize("field", ["policies", "network_policies"])
def test_a_policy_that_is_missing_refuses(world: World, server: Server, field: str):
    old = world.workloads["uid-server"]
    assert passes(world, server.port)
    world.workloads["uid-server"] = msgspec.structs.replace(old, **{field: ("default/lost",)})
    world.publish(world.b)
    assert not passes(world, server.port)


def test_verdicts_by_the_clients_true_address(world: World, server: Server):
    """What the tunnel's own connection comes from counts, not what its header says."""
    own, other = f"{world.client_address}/32", "192.0.2.0/24"

    def by(action: Action, **source: tuple[str, ...]) -> Authorization:
        return Authorization("default", "by-address", action, (Rule((Source(**source),)),))

    for policy, allowed in (
        (by(Action.ALLOW, ip_blocks=(own,)), True),
        (by(Action.ALLOW, ip_blocks=(other,)), False),
        (by(Action.ALLOW, not_ip_blocks=(own,)), False),
        (by(Action.ALLOW, not_ip_blocks=(other,)), True),
        (by(Action.DENY, ip_blocks=(own,)), False),
        (by(Action.DENY, ip_blocks=(other,)), True),
    ):
        set_policies(world, policy)
        assert passes(world, server.port) is allowed, policy


def isolate(world: World, uid: str, policy: NetworkPolicy | None) -> None:
    """Have one NetworkPolicy, or none, select a pod."""
    world.network_policies = [policy] if policy else []
    keys = (f"{policy.namespace}/{policy.name}",) if policy else ()
    world.workloads[uid] = msgspec.structs.replace(world.workloads[uid], network_policies=keys)
    world.publish()


def test_network_policy_ingress(world: World, server: Server):
    world.workloads["uid-client"] = msgspec.structs.replace(
        world.workloads["uid-client"], groups=("friends",)
    )
    world.workloads["uid-server"] = msgspec.structs.replace(
        world.workloads["uid-server"], named_ports=(("web", "TCP", server.port),)
    )
    friends, strangers = NetworkPeer("friends"), NetworkPeer("strangers")
    block = NetworkPeer(cidr=f"{world.client_address}/32")
    right, wrong = NetworkPort("TCP", server.port), NetworkPort("TCP", server.port + 1)
    for rules, allowed in (
        ((), False),
        ((NetworkRule(),), True),
        ((NetworkRule((friends,), (right,)),), True),
        ((NetworkRule((friends,), (wrong,)),), False),
        ((NetworkRule((friends,), (NetworkPort(name="web"),)),), True),
        ((NetworkRule((friends,), (NetworkPort("UDP"),)),), False),
        ((NetworkRule((strangers,)),), False),
        ((NetworkRule((strangers,)), NetworkRule((block,))), True),
        (None, True),
    ):
        isolate(world, "uid-server", NetworkPolicy("default", "n", rules, ()))
        assert passes(world, server.port) is allowed, rules
    set_policies(world, deny(CLIENT))
    assert not passes(world, server.port), "what NetworkPolicy allows has to be authorized too"


def test_network_policy_egress(world: World, server: Server):
    """Judged where the tunnel begins too: which endpoint a proxy has chosen, no kernel has seen."""
    block = NetworkPeer(cidr=f"{world.server_address}/32")
    for rules, allowed in (
        ((), False),
        ((NetworkRule((block,), (NetworkPort("TCP", server.port),)),), True),
        ((NetworkRule((block,), (NetworkPort("TCP", server.port + 1),)),), False),
        ((NetworkRule((NetworkPeer("nobody"),)),), False),
        (None, True),
    ):
        isolate(world, "uid-client", NetworkPolicy("default", "n", (), rules))
        assert passes(world, server.port) is allowed, rules
    assert not world.b.proxy.inbound.waiting
    assert "DENY" in {labels.response_flags for labels in world.a.proxy.accounting.snapshot()}
    assert "DENY" not in {labels.response_flags for labels in world.b.proxy.accounting.snapshot()}


@pytest.mark.parametrize(("uid", "direction"), [("uid-server", "ingress"), ("uid-client", "egress")])
def test_a_network_policy_ends_what_it_no_longer_allows(
    world: World, server: Server, uid: str, direction: str
):
    other = Server(world.server_address, echo)
    with world.dial(server.port) as hit, world.dial(other.port) as kept:
        for sock in (hit, kept):
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
        rules = (NetworkRule((), (NetworkPort("TCP", other.port),)),)
        isolate(world, uid, NetworkPolicy("default", "n", **{direction: rules}))
        with pytest.raises(ConnectionResetError):
            hit.recv(1)
        kept.sendall(b"y")
        assert kept.recv(1) == b"y"
    other.close()


def test_a_source_that_is_not_known_yet_goes_nowhere(world: World, server: Server):
    """Its policies are not known either."""
    client = world.workloads.pop("uid-client")
    world.publish(world.a)
    with world.dial(server.port) as sock:
        sock.sendall(b"x")
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        world.workloads["uid-client"] = client
        world.publish(world.a)
        sock.settimeout(5)
        assert sock.recv(1) == b"x"


def test_a_change_ends_what_is_no_longer_allowed_and_nothing_else(world: World, server: Server):
    other = Server(world.server_address, echo)
    with world.dial(server.port) as hit, world.dial(other.port) as kept:
        for sock in (hit, kept):
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
        began = time.monotonic()
        set_policies(world, allow(CLIENT, ports=(other.port,)))
        with pytest.raises(ConnectionResetError):
            hit.recv(1)
        assert time.monotonic() - began < 3
        assert not passes(world, server.port)
        kept.sendall(b"y")
        assert kept.recv(1) == b"y"
        assert passes(world, other.port)
        set_policies(world)
        assert passes(world, server.port)
    other.close()


@pytest.mark.parametrize("after", [None, 0.4])
def test_how_long_a_connection_outlives_its_policy_is_configured(
    world: World, server: Server, after: float | None
):
    world.b.call(lambda: setattr(world.b.proxy, "_revoke_after", after))
    with world.dial(server.port) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        began = time.monotonic()
        set_policies(world, deny("*"))
        set_policies(world, deny(CLIENT))
        assert not passes(world, server.port)
        if after is None:
            sock.sendall(b"y")
            assert sock.recv(1) == b"y"
            return
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        assert time.monotonic() - began >= after


def test_the_last_good_state_stays_when_an_update_is_broken(world: World, server: Server):
    set_policies(world, deny(CLIENT))
    update = world.update()
    broken = tuple(
        msgspec.structs.replace(r, identity="not-spiffe") if getattr(r, "uid", "") == "uid-server" else r
        for r in update.upserts
    )
    errors = world.b.call(lambda: world.b.proxy.update(msgspec.structs.replace(update, upserts=broken)))
    assert [error.key for error in errors] == ["workload/uid-server"]  # type: ignore[attr-defined]
    assert not passes(world, server.port)
    assert world.b.proxy.mesh.version == ""


def test_removing_the_policy_by_increment(world: World, server: Server):
    set_policies(world, deny(CLIENT))
    assert not passes(world, server.port)
    update = world.update()
    changed = msgspec.structs.replace(world.workloads["uid-server"], policies=())
    delta = msgspec.structs.replace(
        update, complete=False, upserts=(changed,), removes=("authorization/default/deny",)
    )
    assert world.b.call(lambda: world.b.proxy.update(delta)) == ()
    assert passes(world, server.port)
