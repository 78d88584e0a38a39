"""Policy for what arrives by HBONE: verdicts, and what a change of them does to open tunnels."""

import time

import msgspec
import pytest

from controlplane.api import Action, Authorization, Operation, Rule, Source
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


def test_a_policy_that_is_missing_refuses(world: World, server: Server):
    old = world.workloads["uid-server"]
    world.workloads["uid-server"] = msgspec.structs.replace(old, policies=("default/lost",))
    world.publish(world.b)
    assert not passes(world, server.port)


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
