"""Each thing that the agent writes into the kernel is taken away by hand, and comes back with the next comparison, counted."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import replace

import pytest

from agent.compiler import EMPTY
from agent.kernel import Backend, Direction, KernelError, Network, Peer, Pod, namespace
from agent.kernel.model import Frontend
from agent.namespaces import Namespaces
from agent.networks import Networks
from agent.programmer import PodSpec, Programmer
from agent.verdicts import Verdicts
from bpf import wire
from tests.kernel.mesh import run

pytestmark = pytest.mark.privileged

SERVICE = Frontend("10.96.9.7", 80)


class World:
    """A pod that was programmed, and a programmer that wrote all of it."""

    def __init__(self, node, pod) -> None:
        self.node, self.pod = node, pod
        self.tables = EMPTY
        namespaces = Namespaces()
        namespaces.hold(pod.cookie, pod.netns)
        self.namespaces = namespaces
        self.programmer = Programmer(node.kernel, namespaces)
        self.others = self.programmer.programmed
        self.spec = PodSpec(
            pod.uid if hasattr(pod, "uid") else "uid", pod.cookie, pod.addresses, pod.identity
        )

    async def program(self):
        return await self.programmer.program(self.tables, {self.pod.cookie: self.spec}, sealed=self.others)

    async def audit(self):
        return await self.programmer.audit([self.pod.cookie], self.programmer.services())

    async def repaired(self) -> dict[str, int]:
        """What was found, once it was written again and nothing is found any more."""
        found = await self.audit()
        assert (await self.program()).clean
        assert await self.audit() == {}
        kernel = self.node.kernel
        assert kernel.missing(self.pod.cookie, self.pod.netns) == []
        return dict(found)


@pytest.fixture
def world(node, make_pod):
    world = World(node, make_pod())
    assert asyncio.run(world.program()).clean
    assert asyncio.run(world.audit()) == {}
    yield world
    node.kernel.remove_pod(world.pod.cookie)
    world.namespaces.release_others(())


def delete_pod(world) -> None:
    assert world.node.kernel._maps["pods"].delete(struct.pack("=Q", world.pod.cookie))


def delete_address(world) -> None:
    assert world.node.kernel._maps["peers"].delete(wire.pack_address(world.pod.address))


def change_identity(world) -> None:
    table, key = world.node.kernel._maps["pods"], struct.pack("=Q", world.pod.cookie)
    value = bytearray(table.lookup(key))
    struct.pack_into("=I", value, 32, 9999)
    table.update(key, bytes(value))


def delete_policy(world) -> None:
    assert world.node.kernel._maps["policies"].delete(struct.pack("=Q", world.pod.cookie))


def allow_everybody(world) -> None:
    world.node.kernel._policies.set_policy(world.pod.cookie, {(0, 0): True}, 1, {})


def change_interface(world) -> None:
    table = world.node.kernel._maps["interfaces"]
    for key, value in table.items():
        known = wire.Interface.unpack(value)
        if known.netns == world.pod.cookie:
            table.update(key, replace(known, identity=9999).pack())


def unpin_link(world) -> None:
    (world.node.pins / f"v{wire.ABI}/netns/{world.pod.cookie}").unlink()


def delete_rule(world) -> None:
    run(world.pod.netns, "ip", "rule", "del", "priority", str(namespace.DELIVERY_PRIORITY))


def flush_table(world) -> None:
    run(world.pod.netns, "ip", "route", "flush", "table", str(namespace.DELIVERY_TABLE))


def reset_sysctl(world) -> None:
    run(world.pod.netns, "sh", "-c", "echo 0 >/proc/sys/net/ipv4/tcp_fwmark_accept")


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (delete_pod, "pod"),
        (change_identity, "pod"),
        (delete_address, "namespace"),
        (delete_policy, "namespace"),
        (allow_everybody, "policy"),
        (change_interface, "namespace"),
        (unpin_link, "namespace"),
        (delete_rule, "namespace"),
        (flush_table, "namespace"),
        (reset_sysctl, "namespace"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_what_was_taken_from_a_pod_comes_back(world, harm, what):
    harm(world)
    assert what in await world.repaired()
    assert world.node.kernel.pods()[world.pod.cookie] == world.spec.pod
    assert world.node.kernel.policy(world.pod.cookie)[1] == {}


async def test_blocks_of_addresses_come_back(world):
    """Without them an address that is refused is one in no block, and NetworkPolicy isolates nobody."""
    uid, kernel, cookie = world.spec.uid, world.node.kernel, world.pod.cookie
    verdicts = Verdicts({(wire.IDENTITY_PLAIN, 0): True}, {"10.9.0.0/16": 1, "::/0": 2})
    isolated = Network({"10.9.0.0/16": 1}, {0: frozenset(), 1: frozenset({(0, 0, 65535)})})
    world.tables = replace(EMPTY, policies={uid: verdicts}, networks={uid: Networks(isolated, isolated)})
    assert (await world.program()).clean
    assert await world.audit() == {}
    [key] = [
        key for key, _ in kernel._maps["classes"].items() if wire.ClassKey.unpack(key).address == "10.9.0.0"
    ]
    assert kernel._maps["classes"].delete(key)
    assert await world.repaired() == {"policy": 1}
    generation, _ = kernel.policy(cookie)
    assert kernel.policy_classes(cookie, generation) == verdicts.classes
    kernel.set_network(cookie, Direction.INBOUND, None)
    kernel.set_network(cookie, Direction.OUTBOUND, isolated._replace(classes={}))
    assert await world.repaired() == {"network policy": 2}
    assert all(kernel.has_network(cookie, direction, isolated) for direction in Direction)


async def test_peers_that_nobody_wrote_go(world):
    world.node.kernel.set_peer("10.88.7.7", Peer(False, True, 55))
    assert await world.repaired() == {"stray peer": 1}
    assert "10.88.7.7" not in world.node.kernel.peers()


async def test_a_pod_that_nobody_wrote_goes(world, make_pod):
    other = make_pod()
    world.node.kernel.add_pod(Pod(other.cookie, other.addresses, other.identity), other.netns)
    assert (await world.repaired())["stray pod"] == 1
    assert other.cookie not in world.node.kernel.pods()


def test_a_service_whose_backends_are_others_is_written_anew(world):
    """They stand in the service itself."""
    kernel, services = world.node.kernel, world.node.kernel._maps["services"]
    backends = [Backend("10.77.9.1", 80), Backend("10.77.9.2", 80)]
    kernel.set_service(SERVICE.address, SERVICE.port, backends)
    key = wire.Endpoint(SERVICE.address, SERVICE.port).pack()
    written = wire.Service.unpack(services.lookup(key))
    assert [(end.address, end.port) for end in written.few] == [("10.77.9.1", 80), ("10.77.9.2", 80)]
    other = replace(written.few[1], address="10.66.6.6")
    services.update(key, replace(written, few=(*written.few[:1], other)).pack())
    assert kernel.damaged_services([SERVICE]) == [SERVICE]
    kernel.set_service(SERVICE.address, SERVICE.port, backends)
    assert kernel.damaged_services([SERVICE]) == []
    assert wire.Service.unpack(services.lookup(key)).few == written.few
    kernel.remove_service(SERVICE.address, SERVICE.port)


@pytest.mark.parametrize("table", ["services", "backends", "members"])
def test_a_service_that_has_lost_something_is_written_anew(world, table):
    kernel = world.node.kernel
    backends = [Backend(f"10.77.9.{number}", 80) for number in range(1, wire.FEW_BACKENDS + 2)]
    kernel.set_service(SERVICE.address, SERVICE.port, backends, affinity=60)
    assert kernel.damaged_services([SERVICE]) == []
    found = kernel._maps[table]
    mine = wire.Endpoint(SERVICE.address, SERVICE.port).pack()
    one = wire.pack_address("10.77.9.2")
    key = (
        mine
        if table == "services"
        else next(key for key, value in found.items() if value[:16] == one or key[8:24] == one)
    )
    assert found.delete(key)
    assert kernel.damaged_services([SERVICE]) == [SERVICE]
    kernel.set_service(SERVICE.address, SERVICE.port, backends, affinity=60)
    assert kernel.damaged_services([SERVICE]) == []
    kernel.remove_service(SERVICE.address, SERVICE.port)


def test_a_link_that_was_detached_is_attached_by_the_loader(node):
    assert node.kernel.detached() == []
    (node.pins / f"v{wire.ABI}/link_connect4").unlink()
    assert node.kernel.detached() == ["link_connect4"]
    node.load()
    assert node.kernel.detached() == []
    with pytest.raises(KernelError):
        node.kernel.set_policy(1, {}, 1)
