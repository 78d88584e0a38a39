"""Which backend of a service a client gets: drawn anew each time, or kept (session affinity)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from agent.kernel import Backend, Connection, Frontend, Kernel
from bpf import wire
from bpf.maps import Map
from lab.processes import wait_until
from tests.kernel.mesh import Node, TestPod

pytestmark = pytest.mark.privileged

VIP = "10.96.77.1"
BACKENDS = 4


@pytest.fixture
def servers(make_pod: Callable[..., TestPod]) -> Iterator[list[TestPod]]:
    """Pods that listen; whoever connects is known by who has to accept."""
    made = [make_pod() for _ in range(BACKENDS)]
    listeners = []
    for pod in made:
        listeners.append(pod.app.listen(("0.0.0.0", 8080)))
    yield made
    for listener in listeners:
        listener.close()


@pytest.fixture
def clients(make_pod: Callable[..., TestPod], servers: list[TestPod]) -> list[TestPod]:
    made = [make_pod().enrol({}) for _ in range(2)]
    for server in servers:
        server.enrol({(client.identity, 8080): True for client in made})
    return made


@pytest.fixture(autouse=True)
def no_service(node: Node) -> Iterator[None]:
    yield
    for port in (80, 81):
        node.kernel.remove_service(VIP, port)


def backends(servers: list[TestPod]) -> list[Backend]:
    return [Backend(server.address, 8080) for server in servers]


def drawn(node: Node, client: TestPod, *, count: int = 1, port: int = 80) -> set[str]:
    """The addresses of the backends that ``count`` new connections go to, as the servers' kernel has them."""
    found = set()
    # Nobody accepts them, so they stay; and another one may be from the same port, to another backend.
    known = {connection.cookie for connection in node.kernel.connections()}
    for _ in range(count):
        with client.app.connect((VIP, port)) as sock:
            assert sock.getpeername() == (VIP, port)
            connection = _other_end(node, sock.getsockname(), known)
            known.add(connection.cookie)
            found.add(connection.server[0])
    return found


def _other_end(node: Node, client: tuple[str, int], known: set[int]) -> Connection:
    """The server's, which was not there before."""

    def found() -> list[Connection]:
        there = node.kernel.connections()
        return [one for one in there if one.client == client and one.cookie not in known]

    wait_until(lambda: len(found()) == 1, 5.0, "it is there", explain=lambda: str(found()))
    return found()[0]


def members(node: Node) -> int:
    with Map.open(str(node.pins / f"v{wire.ABI}" / "members")) as table:
        return len(list(table.items()))


def test_without_affinity_every_backend_gets_some(node, servers, clients):
    node.kernel.set_service(VIP, 80, backends(servers))
    assert drawn(node, clients[0], count=40) == {server.address for server in servers}


def test_a_client_keeps_its_backend(node, servers, clients):
    node.kernel.set_service(VIP, 80, backends(servers), affinity=60)
    node.kernel.set_service(VIP, 81, backends(servers), affinity=60)
    first = {(client, port): drawn(node, client, port=port) for client in clients for port in (80, 81)}
    for (client, port), address in first.items():
        assert drawn(node, client, count=20, port=port) == address
    assert node.kernel.services()[Frontend(VIP, 80)].affinity == 60


def test_while_it_is_one(node, servers, clients):
    """Other backends may come and go; when its own goes it gets another, and keeps that."""
    client = clients[0]
    node.kernel.set_service(VIP, 80, backends(servers), affinity=60)
    [address] = drawn(node, client)
    others = [server for server in servers if server.address != address]
    own = next(server for server in servers if server.address == address)
    node.kernel.set_service(VIP, 80, backends([own, others[0]]), affinity=60)
    assert drawn(node, client, count=20) == {address}
    node.kernel.set_service(VIP, 80, backends(others), affinity=60)
    [second] = drawn(node, client)
    assert second != address
    node.kernel.set_service(VIP, 80, backends(servers), affinity=60)
    assert drawn(node, client, count=20) == {second}
    node.kernel.set_service(VIP, 80, [], affinity=60)
    with pytest.raises(ConnectionRefusedError):
        client.app.connect((VIP, 80))


def test_wherever_the_backends_stand(node, servers, clients):
    """Few in the service itself, many and those with weights in slots."""
    client = clients[0]
    few = backends(servers)
    node.kernel.set_service(VIP, 80, few, affinity=60)
    [address] = drawn(node, client)
    own = next(backend for backend in few if backend.address == address)
    many = [Backend(f"10.66.1.{number}", 8080) for number in range(wire.FEW_BACKENDS)]
    for now in ([*many, own], few, [own._replace(weight=3), *many[:2]], [*many[1:], own], [own]):
        node.kernel.set_service(VIP, 80, now, affinity=60)
        assert drawn(node, client, count=10) == {address}


def test_for_a_time_after_its_last_connection(node, servers, clients):
    client = clients[0]
    node.kernel.set_service(VIP, 80, backends(servers), affinity=1)
    began = time.monotonic()
    address = drawn(node, client)
    kept = 0
    deadline = began + 60
    while kept < 15:  # each one begins the second anew
        assert time.monotonic() < deadline
        time.sleep(0.1)
        before, began = began, time.monotonic()
        now = drawn(node, client)
        if time.monotonic() - before < 1.0:  # on a machine under load it may be over
            assert now == address
            kept += 1
        else:
            address, kept = now, 0
    found: set[str] = set()
    deadline = time.monotonic() + 60
    while len(found | address) == 1 and time.monotonic() < deadline:
        time.sleep(1.1)
        found |= drawn(node, client)
    assert found - address, "never another, though each time was over"


def test_no_longer_when_the_service_has_none(node, servers, clients):
    node.kernel.set_service(VIP, 80, backends(servers), affinity=60)
    drawn(node, clients[0])
    node.kernel.set_service(VIP, 80, backends(servers))
    assert drawn(node, clients[0], count=40) == {server.address for server in servers}


def test_members_go_with_their_backends(node):
    """Few are members by standing in the service itself."""
    before = members(node)
    many = [Backend(f"10.66.0.{number}", 80) for number in range(2 * wire.FEW_BACKENDS)]
    more = many[: wire.FEW_BACKENDS + 1]
    node.kernel.set_service(VIP, 80, many, affinity=60)
    assert members(node) == before + len(many)
    node.kernel.set_service(VIP, 80, more, affinity=60)
    assert members(node) == before + len(more)
    node.kernel.set_service(VIP, 80, many[: wire.FEW_BACKENDS], affinity=60)
    assert members(node) == before
    node.kernel.set_service(VIP, 80, many)
    assert members(node) == before
    node.kernel.set_service(VIP, 80, many, affinity=60)
    # A successor of the agent finds what there is, and what nobody needs any more it removes.
    with Map.open(str(node.pins / f"v{wire.ABI}" / "members")) as table:
        orphan = wire.MemberKey(77_777, 0, "10.1.2.3", 80).pack()
        table.update(orphan, bytes(4))
        with Kernel(node.pins, node.netns) as successor:
            assert table.lookup(orphan) is None
            assert successor.services()[Frontend(VIP, 80)] == (False, tuple(many), 60)
    assert members(node) == before + len(many)
    node.kernel.remove_service(VIP, 80)
    assert members(node) == before


class _KilledError(BaseException):
    """In the midst of a change."""


class _Dying:
    """A table of the kernel, written a number of times more."""

    def __init__(self, table: Map, left: list[int]) -> None:
        self._table = table
        self._left = left

    def _count(self) -> None:
        self._left[0] -= 1
        if self._left[0] < 0:
            raise _KilledError

    def update(self, key: bytes, value: bytes) -> None:
        self._count()
        self._table.update(key, value)

    def delete(self, key: bytes) -> bool:
        self._count()
        return self._table.delete(key)


def test_what_a_killed_agent_left_half_done(node):
    """Whatever the last thing was that it wrote: its successor has each backend once, and nobody else is one."""
    many = [Backend(f"10.66.0.{number}", 80) for number in range(wire.FEW_BACKENDS + 4)]
    changes = {
        "fewer": many[:-2],
        "others": [*many[:-2], Backend("10.66.1.1", 80), Backend("10.66.1.2", 80)],
        "all others": [backend._replace(address=f"10.67.0.{n}") for n, backend in enumerate(many)],
    }
    before = members(node)
    for name, changed in changes.items():
        for steps in range(200):
            node.kernel.set_service(VIP, 80, many, affinity=60)
            services = node.kernel._services
            tables = ("_services", "_backends", "_members")
            whole = {table: getattr(services, table) for table in tables}
            left = [steps]
            try:
                for table in tables:
                    setattr(services, table, _Dying(whole[table], left))
                node.kernel.set_service(VIP, 80, changed, affinity=60)
                killed = False
            except _KilledError:
                killed = True
            finally:
                for table in tables:
                    setattr(services, table, whole[table])
            with Kernel(node.pins, node.netns) as successor:
                successor.set_service(VIP, 80, changed, affinity=60)
                found = successor._services._known[wire.Endpoint(VIP, 80)]
                assert sorted(found.slots) == sorted(changed), (name, steps)
                assert successor.damaged_services([Frontend(VIP, 80)]) == []
                assert members(node) == before + len(changed), (name, steps)
                slots = [wire.Backend.unpack(value).address for _, value in whole["_backends"].items()]
                assert sorted(slots) == sorted(backend.address for backend in changed), (name, steps)
                successor.remove_service(VIP, 80)
            # What this one knows is of before.
            node.kernel._services._known.pop(wire.Endpoint(VIP, 80), None)
            if not killed:
                break
        assert steps > 4


@pytest.mark.parametrize("affinity", [-1, 1 << 24])
def test_what_is_no_number_of_seconds(node, servers, affinity):
    with pytest.raises(ValueError, match="session affinity"):
        node.kernel.set_service(VIP, 80, backends(servers), affinity=affinity)
    assert Frontend(VIP, 80) not in node.kernel.services()
