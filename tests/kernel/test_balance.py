"""Services as they change: weights, many backends, and changes under clients that dial all the time."""

from __future__ import annotations

import itertools
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from agent.kernel import Backend, Frontend, Kernel, MapFullError
from bpf import wire
from bpf.maps import Map
from bpf.wire import Protocol
from tests.kernel.mesh import Node, TestPod

pytestmark = pytest.mark.privileged

VIP = "10.96.78.1"
UDP = Protocol.UDP
MANY = 10_000


@pytest.fixture
def client(make_pod: Callable[..., TestPod]) -> TestPod:
    return make_pod().enrol({})


@pytest.fixture(autouse=True)
def no_service(node: Node) -> Iterator[None]:
    yield
    for protocol in Protocol:
        node.kernel.remove_service(VIP, 80, protocol)


def many(count: int = MANY, first: int = 0) -> list[Backend]:
    return [Backend(f"10.66.{n >> 8}.{n & 255}", 8080) for n in range(first, first + count)]


def dialled(client: TestPod, count: int) -> Counter[str]:
    """Where so many UDP sockets are connected to, as the kernel has it: no packet is sent."""
    return Counter(client.app.dial_many((VIP, 80), count))


@pytest.mark.parametrize("weights", [(1, 1, 1), (80, 20), (1, 2, 3, 94), (5, 5, 0)])
def test_weights(node, client, weights):
    """Chi-squared at 1e-6: it fails by chance once in a million runs."""
    backends = [Backend(f"10.66.0.{n}", 8080, weight) for n, weight in enumerate(weights, 1)]
    node.kernel.set_service(VIP, 80, backends, protocol=UDP)
    count, total = 6000, sum(weights)
    found = dialled(client, count)
    assert sum(found.values()) == count
    chi = 0.0
    for backend in backends:
        if backend.weight == 0:
            assert found[backend.address] == 0
        else:
            expected = count * backend.weight / total
            chi += (found[backend.address] - expected) ** 2 / expected
    # Quantiles of 1 - 1e-6 for up to three degrees of freedom.
    assert chi < (23.9, 27.6, 30.7)[sum(1 for w in weights if w) - 2], found


def elements(node: Node, *names: str) -> dict[str, dict[bytes, bytes]]:
    found = {}
    for name in names:
        with Map.open(str(node.pins / f"v{wire.ABI}" / name)) as table:
            found[name] = dict(table.items())
    return found


def test_one_of_ten_thousand_changes(node, client):
    """What is written is the change's slots and members. On return nothing leads to what is gone."""
    before = elements(node, "backends", "members")
    backends = many()
    node.kernel.set_service(VIP, 80, backends, protocol=UDP)
    then = elements(node, "backends", "members")
    assert len(then["backends"]) - len(before["backends"]) == MANY
    assert len(then["members"]) - len(before["members"]) == MANY
    for gone, come in ((1, 0), (0, 1), (1, 1), (3, 1), (1, 3)):
        fresh = many(come, MANY + next(_fresh) * 10)
        backends = backends[:5000] + backends[5000 + gone :] + fresh
        node.kernel.set_service(VIP, 80, backends, protocol=UDP)
        now = elements(node, "backends", "members")
        changed = {key for key, _ in now["backends"].items() ^ then["backends"].items()}
        assert len(changed) <= 2 * (gone + come)
        assert len(now["members"].keys() ^ then["members"].keys()) == gone + come
        then = now
        assert set(node.kernel.services()[Frontend(VIP, 80, UDP)].backends) == set(backends)
        with Kernel(node.pins) as successor:
            assert set(successor.services()[Frontend(VIP, 80, UDP)].backends) == set(backends)
    addresses = {backend.address for backend in backends}
    assert set(dialled(client, 500)) <= addresses
    node.kernel.remove_service(VIP, 80, UDP)
    assert elements(node, "backends", "members") == before


_fresh = itertools.count()


def test_changes_under_clients_that_dial(node, client):
    """At no moment none, or one that is of neither list: slot by slot, all at once, and with weights."""
    stop = threading.Event()
    wrong: list[str] = []
    done = [0]
    base = many(1000)
    allowed = {backend.address for backend in many(3000)}

    def dial() -> None:
        while not stop.is_set():
            try:
                found = dialled(client, 200)
            except OSError as error:
                wrong.append(str(error))
                return
            wrong.extend(address for address in found if address not in allowed)
            done[0] += found.total()

    node.kernel.set_service(VIP, 80, base, protocol=UDP)
    thread = threading.Thread(target=dial)
    thread.start()
    try:
        deadline = time.monotonic() + 4
        for turn in itertools.count():
            if time.monotonic() > deadline and done[0] > 2000:
                break
            for size in (1000, 990, 1100, 3, 1, 2000):
                start = turn % 3 * 500
                backends = many(size, start)
                node.kernel.set_service(VIP, 80, backends, protocol=UDP)
            # Down to one and back, slot by slot.
            backends = many(40)
            node.kernel.set_service(VIP, 80, backends, protocol=UDP)
            while len(backends) > 4:
                backends = backends[1:]
                node.kernel.set_service(VIP, 80, backends, protocol=UDP)
            weighted = [b._replace(weight=n % 7 + 1) for n, b in enumerate(many(100))]
            node.kernel.set_service(VIP, 80, weighted, protocol=UDP)
    finally:
        stop.set()
        thread.join(30)
    assert wrong == []
    assert done[0] > 2000
    assert set(dialled(client, 300)) <= {backend.address for backend in weighted}


@pytest.mark.parametrize("size", [1, wire.FEW_BACKENDS + 1])
def test_what_is_another_services_is_no_backend(node, client, size):
    """As a program finds it that was stopped between lookup and read, while the element was written for another."""
    services, slots = node.kernel._maps["services"], node.kernel._maps["backends"]
    key, other = (wire.Endpoint(VIP, port, UDP) for port in (80, 81))
    for port, first in ((80, 0), (81, 5000)):
        node.kernel.set_service(VIP, port, many(size, first), protocol=UDP)
    try:
        own, others = (wire.Service.unpack(services.lookup(one.pack())) for one in (key, other))
        assert set(dialled(client, 50)) <= {backend.address for backend in many(size)}
        # All of it; only its backends, of which none is this one's; only what is said of them.
        for torn in (others, replace(own, few=others.few), replace(own, count=own.count + 1)):
            if torn == own:
                continue
            services.update(key.pack(), torn.pack())
            with pytest.raises(ConnectionRefusedError):
                dialled(client, 1)
        services.update(key.pack(), own.pack())
        for slot in range(0 if own.few else size):
            mine, its = (struct.pack("=III", one.id, one.generation, slot) for one in (own, others))
            slots.update(mine, slots.lookup(its))
        if not own.few:
            with pytest.raises(ConnectionRefusedError):
                dialled(client, 1)
    finally:
        node.kernel.remove_service(VIP, 81, UDP)


def test_no_room_for_more(tmp_path):
    """What was there stays whole, slot by slot and all at once."""
    node = Node(tmp_path, sizes=("backends=1024", "members=1040"))
    try:
        for protocol in Protocol:
            first = many(600)
            node.kernel.set_service(VIP, 80, first, protocol=protocol)
            for more in (many(1000), many(600, 900)):
                with pytest.raises(MapFullError):
                    node.kernel.set_service(VIP, 80, [*more, Backend("10.1.1.1", 1)], protocol=protocol)
                assert node.kernel.services()[Frontend(VIP, 80, protocol)].backends == tuple(first)
                with Kernel(node.pins) as successor:
                    assert successor.services()[Frontend(VIP, 80, protocol)].backends == tuple(first)
            # One by one there is room up to the last element.
            grown = many(600)
            while len(grown) < 1000:
                grown = [*grown, *many(100, len(grown))]
                node.kernel.set_service(VIP, 80, grown, protocol=protocol)
            with pytest.raises(MapFullError):
                node.kernel.set_service(VIP, 80, [*grown, *many(100, 1000)], protocol=protocol)
            with Kernel(node.pins) as successor:
                assert successor.services()[Frontend(VIP, 80, protocol)].backends == tuple(grown)
            node.kernel.remove_service(VIP, 80, protocol)
            left = elements(node, "backends", "members", "services")
            assert left == {"backends": {}, "members": {}, "services": {}}
    finally:
        node.close()


def test_weights_of_a_predecessor_are_written_anew(node, client):
    """Nobody can read them off their table; equal ones are no weights."""
    backends = [Backend("10.66.0.1", 8080, 3), Backend("10.66.0.2", 8080, 1)]
    node.kernel.set_service(VIP, 80, backends, protocol=UDP)
    with Kernel(node.pins) as successor:
        assert all(b.weight == 0 for b in successor.services()[Frontend(VIP, 80, UDP)].backends)
        successor.set_service(VIP, 80, backends, protocol=UDP)
        assert successor.services()[Frontend(VIP, 80, UDP)].backends == tuple(backends)
        assert set(dialled(client, 200)) == {"10.66.0.1", "10.66.0.2"}
        then = elements(node, "backends")
        successor.set_service(VIP, 80, backends, protocol=UDP)
        assert elements(node, "backends") == then
        successor.set_service(VIP, 80, [b._replace(weight=9) for b in backends], protocol=UDP)
        assert all(b.weight == 1 for b in successor.services()[Frontend(VIP, 80, UDP)].backends)
        successor.remove_service(VIP, 80, UDP)
    for wrong in (-1, 1 << 32):
        with pytest.raises(ValueError, match="weight"):
            node.kernel.set_service(VIP, 80, [Backend("10.66.0.1", 1, wrong)], protocol=UDP)
