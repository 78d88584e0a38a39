"""Sessions with proxies: real SEQPACKET sockets, a stand-in for what makes sockets in pods."""

import asyncio
import os
import socket
import sys
from typing import Any

import pytest

from agent import api, processes
from agent.packets import Connection, Server
from agent.proxies import Proxies, ProxyRefused, SocketError
from common import seqpacket

NODEPROXY = (api.ListenerKind.OUTBOUND, api.ListenerKind.HBONE)


def pod(name: str = "web", cookie: int = 7) -> api.Enroll:
    return api.Enroll(
        uid=f"uid-{name}",
        netns_cookie=cookie,
        address=f"10.0.0.{cookie}",
        namespace="default",
        name=name,
        service_account=name,
        identity=f"spiffe://cluster.local/ns/default/sa/{name}",
    )


class Enrolled:
    def __init__(self) -> None:
        self.pods: list[api.Enroll] = []
        self.others: list[api.Enroll] = []  #: attached, not in the mesh
        self.gone: list[tuple[str, int]] = []  #: while no agent ran

    def enrolled(self):
        return tuple(self.pods)

    def ended(self):
        return tuple(self.gone)

    def attached(self, uid, netns_cookie):
        pods = (*self.pods, *self.others)
        return any((pod.uid, pod.netns_cookie) == (uid, netns_cookie) for pod in pods)


def cookie_of(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder)  # SO_COOKIE


class PodSockets:
    def __init__(self) -> None:
        #: cookie and port
        self.registered: dict[tuple[str, api.ListenerKind], tuple[int, int]] = {}
        self.made: list[tuple[str, api.ListenerKind]] = []
        self.fails = False
        #: with a gate, listeners wait for it, and ``waits`` says that one does
        self.gate: asyncio.Event | None = None
        self.waits = asyncio.Event()

    async def listener(self, netns_cookie, addresses, kind):
        address = ",".join(addresses)
        if self.gate is not None:
            self.waits.set()
            await self.gate.wait()
        if self.fails:
            raise SocketError("no")
        self.made.append((address, kind))
        sock = socket.socket()
        sock.listen()
        return sock.detach()

    def publish(self, addresses, kind, fd):
        address = ",".join(addresses)
        with socket.socket(fileno=os.dup(fd)) as sock:
            self.registered[address, kind] = cookie_of(sock), sock.getsockname()[1]

    def live(self, addresses, kind):
        return self.registered.get((",".join(addresses), kind), (0, 0))[0]

    async def outgoing(self, netns_cookie, purpose, count, *, ipv6):
        if self.fails:
            raise SocketError("no")
        return [socket.socket().detach() for _ in range(count)]


MARKS = (api.Known, api.Serving, api.Drain)


class Proxy:
    """The other end."""

    def __init__(self, path) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(path))
        self.connection = Connection(sock)
        self.listeners: dict[tuple[str, api.ListenerKind], int] = {}
        self.marks: list[type] = []
        self.heard: list[Any] = []

    async def say(self, message) -> None:
        await self.connection.send(api.encode(message))

    async def hear(self):
        """The next message and how many descriptors came with it, but for the markers, which are noted in ``marks``."""
        while isinstance((answer := await self.hear_all())[0], MARKS):
            pass
        return answer

    async def settled(self, mark=api.Serving):
        """Wait for a marker; what comes before it is kept in ``heard``."""
        while mark not in self.marks:
            message, _ = await self.hear_all()
            assert message is not None
            self.heard.append(message)

    async def hear_all(self):
        """Every message; listeners stay open until :meth:`die`."""
        data, fds = await asyncio.wait_for(self.connection.receive(), 5)
        message = api.decode_from_agent(data) if data else None
        if isinstance(message, api.Enroll):
            assert len(fds) == len(message.listeners)
            for kind, fd in zip(message.listeners, fds, strict=True):
                self.listeners[message.uid, kind] = fd
        else:
            for fd in fds:
                os.close(fd)
        if isinstance(message, MARKS):
            self.marks.append(type(message))
        return message, len(fds)

    async def greet(self, role=api.Role.NODEPROXY, **more):
        await self.say(api.Hello(role, **more))
        return await self.hear()

    def die(self) -> None:
        self.connection.close()
        for fd in self.listeners.values():
            os.close(fd)
        self.listeners.clear()


class World:
    def __init__(self, tmp_path) -> None:
        self.enrolled = Enrolled()
        self.sockets = PodSockets()
        self.registered: list[tuple[api.Role, int]] = []
        self.path = tmp_path / "agent.sock"
        self.proxies = Proxies(
            node="n1",
            enrolled=self.enrolled,
            sockets=self.sockets,
            register=self.register,
            maps=lambda: {"captured": os.open("/dev/null", os.O_RDONLY)},
        )
        self.server = Server(self.path, self.proxies.serve, name="test")
        self.peers: list[Proxy] = []

    def register(self, role, cgroup) -> None:
        self.registered.append((role, cgroup.id))

    async def enroll(self, pod: api.Enroll) -> None:
        """As the node does: first it is so, then it is said."""
        others = [p for p in self.enrolled.pods if p.netns_cookie != pod.netns_cookie]
        self.enrolled.pods = [*others, pod]
        await self.proxies.enroll(pod)

    def proxy(self) -> Proxy:
        self.peers.append(Proxy(self.path))
        return self.peers[-1]


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    made.server.start()
    yield made
    for peer in made.peers:
        peer.die()
    await made.server.close()


def open_sockets() -> int:
    """Of this process; the listing's own descriptor is gone again when its link is read."""
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith("socket:") for link in links if os.path.lexists(link))


async def test_welcome_registers_the_peers_cgroup(world):
    message, fds = await world.proxy().greet()
    assert message == api.Welcome("n1", maps=("captured",))
    assert fds == 1
    assert world.registered == [(api.Role.NODEPROXY, processes.cgroup_of("self").id)]
    assert world.proxies.connected() == {"nodeproxy": 1, "l7proxy": 0}


async def test_pods_come_with_listeners_and_the_agent_keeps_none(world):
    world.enrolled.pods = [pod()]
    proxy = world.proxy()
    await proxy.greet()
    message, _ = await proxy.hear()
    assert message.uid == "uid-web"
    assert message.listeners == NODEPROXY
    await proxy.settled()
    _, port = world.sockets.registered["10.0.0.7", api.ListenerKind.OUTBOUND]
    socket.create_connection(("127.0.0.1", port)).close()
    proxy.die()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


async def test_each_role_gets_its_own_kinds(world):
    world.enrolled.pods = [pod()]
    l7proxy = world.proxy()
    await l7proxy.greet(api.Role.L7PROXY)
    message, _ = await l7proxy.hear()
    assert message.listeners == (api.ListenerKind.OUTBOUND_L7,)
    envoy = world.proxy()
    await envoy.greet(kinds=(*NODEPROXY, api.ListenerKind.OUTBOUND_L7))
    message, _ = await envoy.hear()
    assert message.listeners == (*NODEPROXY, api.ListenerKind.OUTBOUND_L7)


async def test_changes_come_without_new_listeners(world):
    proxy = world.proxy()
    await proxy.greet()
    await world.enroll(pod())
    message, _ = await proxy.hear()
    assert message.listeners == NODEPROXY
    await world.enroll(api.Enroll(**{**_fields(pod()), "version": "v2"}))
    message, fds = await proxy.hear()
    assert (message.version, message.listeners, fds) == ("v2", (), 0)
    await world.proxies.withdraw("uid-web", 7)
    message, _ = await proxy.hear()
    assert message == api.Withdraw("uid-web", 7)
    # The next sandbox of that namespace's number begins anew.
    world.sockets.registered.clear()
    await world.enroll(pod())
    message, _ = await proxy.hear()
    assert message.listeners == NODEPROXY


def _fields(message) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__struct_fields__}


async def test_who_holds_its_listeners_gets_no_new_ones(world):
    world.enrolled.pods = [pod()]
    world.sockets.registered = {(f"10.0.0.{7}", kind): (1, 1) for kind in NODEPROXY}
    proxy = world.proxy()
    await proxy.greet(held=tuple(api.Held("uid-web", 7, kind) for kind in NODEPROXY))
    message, _ = await proxy.hear()
    assert message.listeners == ()
    assert world.sockets.made == []


async def test_who_holds_what_is_gone_is_told(world):
    proxy = world.proxy()
    await proxy.greet(held=tuple(api.Held("uid-web", 7, kind) for kind in NODEPROXY))
    message, _ = await proxy.hear()
    assert message == api.Withdraw("uid-web", 7)


async def test_of_a_pod_that_had_left_and_ended_while_no_agent_was_there_nothing_stays(world):
    """It has no listener any more that a proxy could tell of, but sockets in stock."""
    world.enrolled.gone = [("uid-left", 9)]
    world.enrolled.pods = [pod()]
    world.sockets.registered = {(f"10.0.0.{7}", kind): (1, 1) for kind in NODEPROXY}
    proxy = world.proxy()
    await proxy.greet(held=tuple(api.Held("uid-web", 7, kind) for kind in NODEPROXY))
    message, _ = await proxy.hear()
    assert message == api.Withdraw("uid-left", 9)


async def test_a_pod_that_left_while_no_agent_was_there_keeps_what_is_open(world):
    world.enrolled.others = [pod()]
    proxy = world.proxy()
    await proxy.greet(held=tuple(api.Held("uid-web", 7, kind) for kind in NODEPROXY))
    message, _ = await proxy.hear()
    assert message == api.Withdraw("uid-web", 7, drain=True)


async def test_who_says_it_holds_what_the_kernel_does_not_know_gets_new_ones(world):
    world.enrolled.pods = [pod()]
    world.sockets.registered = {("10.0.0.7", api.ListenerKind.OUTBOUND): (1, 1)}
    proxy = world.proxy()
    await proxy.greet(held=tuple(api.Held("uid-web", 7, kind) for kind in NODEPROXY))
    message, _ = await proxy.hear()
    assert message.listeners == (api.ListenerKind.HBONE,)


def held(proxy: Proxy) -> tuple[api.Held, ...]:
    """What a proxy says that comes back."""
    found = []
    for (uid, kind), fd in proxy.listeners.items():
        with socket.socket(fileno=os.dup(fd)) as sock:
            found.append(api.Held(uid, 7, kind, cookie_of(sock)))
    return tuple(found)


def owns(world, proxy: Proxy) -> bool:
    """Whether the kernel's listeners are this proxy's."""
    return {h.socket for h in held(proxy)} == {cookie for cookie, _ in world.sockets.registered.values()}


async def test_a_new_process_takes_over_when_it_is_ready_and_the_old_one_drains(world):
    world.enrolled.pods = [pod()]
    old, new = world.proxy(), world.proxy()
    await old.greet()
    await old.settled()
    assert owns(world, old)
    # It hears of every pod, and gets nothing that would take traffic.
    await new.greet(serving=False)
    await new.settled(api.Known)
    assert [m.listeners for m in new.heard if isinstance(m, api.Enroll)] == [()]
    assert owns(world, old)
    # A pod that comes now is the old one's.
    await world.enroll(pod("other", 8))
    assert (await new.hear())[0].listeners == ()
    assert (await old.hear())[0].listeners == NODEPROXY
    await new.say(api.Serve())
    await new.settled()
    await old.settled(api.Drain)
    assert len(new.listeners) == 4
    assert owns(world, new)
    assert old.marks == [api.Known, api.Serving, api.Drain]
    # What the old one had still takes what was on its way.
    with socket.socket(fileno=os.dup(old.listeners["uid-web", api.ListenerKind.HBONE])) as listener:
        socket.create_connection(listener.getsockname()).close()
    # A pod that comes now has its listeners with the new one; the old one still hears of it.
    await world.enroll(pod("third", 9))
    message, _ = await old.hear()
    assert (message.uid, message.listeners) == ("uid-third", ())
    assert (await new.hear())[0].listeners == NODEPROXY
    # And if the new one fails, the old one takes over again.
    new.die()
    world.sockets.registered.clear()
    old.marks.clear()
    await old.settled()
    assert owns(world, old)


async def test_a_new_process_that_dies_before_it_serves_changes_nothing(world):
    world.enrolled.pods = [pod()]
    old, new = world.proxy(), world.proxy()
    await old.greet()
    await old.settled()
    made = list(world.sockets.made)
    await new.greet(serving=False)
    await new.settled(api.Known)
    new.die()
    await old.say(api.GetSockets(1, "uid-web", 7, api.Purpose.OUTBOUND))
    assert isinstance((await old.hear())[0], api.Sockets)
    assert world.sockets.made == made
    assert old.marks == [api.Known, api.Serving]


async def test_who_is_not_ready_serves_where_nobody_else_does(world):
    """Connections wait for it then, and are not refused at once."""
    world.enrolled.pods = [pod()]
    proxy = world.proxy()
    await proxy.greet(serving=False)
    await proxy.settled()
    assert owns(world, proxy)


async def test_who_is_not_ready_gets_what_the_last_one_closes_late(world, monkeypatch):
    """A process' connection to the agent may close before its listeners do."""
    monkeypatch.setattr("agent.proxies._CLOSING", 0.2)
    world.enrolled.pods = [pod()]
    old, new = world.proxy(), world.proxy()
    await old.greet()
    await old.settled()
    await new.greet(serving=False)
    await new.settled(api.Known)
    old.die()
    await new.settled()
    assert new.listeners == {}
    world.sockets.registered.clear()
    while not new.listeners:
        await new.hear()
    assert owns(world, new)


async def test_an_older_version_hears_nothing_that_it_does_not_know(world):
    world.enrolled.pods = [pod()]
    old, new = world.proxy(), world.proxy()
    assert (await old.greet(version=1))[0].version == 1
    assert (await old.hear_all())[0].listeners == NODEPROXY
    await new.greet()
    await new.settled()
    await world.enroll(pod("other", 8))
    message, _ = await old.hear_all()
    assert (message.uid, message.listeners, old.marks) == ("uid-other", (), [])


@pytest.mark.parametrize("first", ["old", "new"])
async def test_both_come_back_to_a_new_agent_in_any_order(world, monkeypatch, first):
    world.enrolled.pods = [pod()]
    started = iter((100, 200) if first == "old" else (200, 100))
    monkeypatch.setattr("agent.proxies.processes.started", lambda pid: next(started))
    monkeypatch.setattr("agent.proxies._RETURN", 0.5)
    had = []
    for _ in range(2):
        sock = socket.socket()
        sock.listen()
        had.append(sock)
    # Of a pod that came late the kernel has the new one's; the old one would say so of its own.
    for kind in NODEPROXY:
        world.sockets.registered["10.0.0.7", kind] = cookie_of(had[1]), 1
    peers = {name: world.proxy() for name in ("old", "new")}
    watching = asyncio.create_task(world.proxies.watch())
    for name in ("old", "new") if first == "old" else ("new", "old"):
        sock = had[("old", "new").index(name)]
        mine = tuple(api.Held("uid-web", 7, kind, cookie_of(sock)) for kind in NODEPROXY)
        await peers[name].greet(held=mine)
        assert (await peers[name].hear())[0].listeners == ()
    assert world.sockets.made == []
    await watching
    assert world.sockets.made == []
    await peers["new"].settled()
    await peers["old"].settled(api.Drain)
    for sock in had:
        sock.close()


async def test_who_comes_back_with_what_is_not_the_kernels_any_more_gets_it_anew(world, monkeypatch):
    monkeypatch.setattr("agent.proxies._RETURN", 0.0)
    world.enrolled.pods = [pod()]
    world.sockets.registered = {("10.0.0.7", kind): (1, 1) for kind in NODEPROXY}
    proxy = world.proxy()
    await proxy.greet(held=tuple(api.Held("uid-web", 7, kind, 2) for kind in NODEPROXY))
    await proxy.settled()
    assert owns(world, proxy)


async def test_a_pod_that_leaves_while_it_is_handed_over_is_gone_at_last(world):
    world.enrolled.pods = [pod(), pod("other", 8)]
    world.sockets.gate = asyncio.Event()
    proxy = world.proxy()
    await proxy.greet()
    await world.sockets.waits.wait()  # for the first pod's listener
    world.enrolled.pods = []
    leaving = [
        asyncio.create_task(world.proxies.withdraw(f"uid-{name}", cookie))
        for name, cookie in (("web", 7), ("other", 8))
    ]
    await asyncio.sleep(0)
    world.sockets.gate.set()
    await asyncio.gather(*leaving)
    heard = [(await proxy.hear())[0] for _ in range(3)]
    assert [(type(m), m.uid) for m in heard if m.uid == "uid-web"] == [
        (api.Enroll, "uid-web"),
        (api.Withdraw, "uid-web"),
    ]
    assert [type(m) for m in heard if m.uid == "uid-other"] == [api.Withdraw]


async def test_a_proxy_that_goes_while_another_is_served_disturbs_nobody(world):
    going, staying = world.proxy(), world.proxy()
    await going.greet()
    await staying.greet(api.Role.L7PROXY)
    world.sockets.gate = asyncio.Event()
    telling = [asyncio.create_task(world.enroll(pod(name, cookie))) for name, cookie in (("a", 8), ("b", 9))]
    await world.sockets.waits.wait()
    going.die()
    for _ in range(500):
        if not world.proxies.connected()["nodeproxy"]:
            break
        await asyncio.sleep(0.01)
    assert world.proxies.connected() == {"nodeproxy": 0, "l7proxy": 1}
    world.sockets.gate.set()
    await asyncio.gather(*telling)
    assert {(await staying.hear())[0].uid for _ in range(2)} == {"uid-a", "uid-b"}


async def test_an_agent_that_ends_moves_no_listener(world):
    world.enrolled.pods = [pod()]
    old, new = world.proxy(), world.proxy()
    for proxy in (old, new):
        await proxy.greet()
        await proxy.hear()
    world.sockets.registered.clear()
    made = list(world.sockets.made)
    await world.server.close()
    assert world.sockets.made == made


async def test_sockets(world):
    world.enrolled.pods = [pod()]
    proxy = world.proxy()
    await proxy.greet()
    await proxy.hear()
    await proxy.say(api.GetSockets(1, "uid-web", 7, api.Purpose.DELIVERY, 5))
    assert await proxy.hear() == (api.Sockets(1, 5), 5)
    world.sockets.fails = True
    await proxy.say(api.GetSockets(2, "uid-web", 7, api.Purpose.OUTBOUND))
    assert await proxy.hear() == (api.Sockets(2, 0, "no"), 0)


@pytest.mark.parametrize(
    ("role", "request_", "reason"),
    [
        (api.Role.NODEPROXY, api.GetSockets(1, "uid-gone", 7, api.Purpose.OUTBOUND), "not enrolled"),
        (api.Role.NODEPROXY, api.GetSockets(1, "uid-web", 8, api.Purpose.OUTBOUND), "another sandbox"),
        (api.Role.NODEPROXY, api.GetSockets(1, "uid-web", 7, api.Purpose.OUTBOUND, 0), "count 0"),
        (api.Role.NODEPROXY, api.GetSockets(1, "uid-web", 7, api.Purpose.OUTBOUND, 33), "count 33"),
        (api.Role.L7PROXY, api.GetSockets(1, "uid-web", 7, api.Purpose.DELIVERY), "only the node proxy"),
    ],
)
async def test_sockets_that_nobody_gets(world, role, request_, reason):
    world.enrolled.pods = [pod()]
    proxy = world.proxy()
    await proxy.greet(role)
    await proxy.hear()
    await proxy.say(request_)
    message, fds = await proxy.hear()
    assert reason in message.error
    assert (message.count, fds) == (0, 0)


class TestRefused:
    async def refused(self, world, data: bytes) -> str:
        proxy = world.proxy()
        await proxy.connection.send(data)
        message, _ = await proxy.hear()
        assert isinstance(message, api.Refused)
        assert await proxy.hear() == (None, 0)
        assert sum(world.proxies.connected().values()) == 0
        return message.reason

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"nonsense", "not understood"),
            (api.encode(api.Hello(api.Role.NODEPROXY, version=99)), "version 99"),
            (api.encode(api.Hello(api.Role.NODEPROXY, version=0)), "version 0"),
            (api.encode(api.GetSockets(1, "u", 1, api.Purpose.OUTBOUND)), "first message"),
            (api.encode(api.Hello(api.Role.L7PROXY, kinds=(api.ListenerKind.HBONE,))), "hbone"),
        ],
    )
    async def test_by_what_it_says(self, world, data, reason):
        assert reason in await self.refused(world, data)

    async def test_in_a_pods_namespace(self, world):
        with socket.socket() as sock:
            cookie = int.from_bytes(
                sock.getsockopt(socket.SOL_SOCKET, 71, 8), sys.byteorder
            )  # SO_NETNS_COOKIE
        world.enrolled.pods = [pod("here", cookie)]
        assert "pod's network namespace" in await self.refused(
            world, api.encode(api.Hello(api.Role.NODEPROXY))
        )
        assert world.registered == []

    async def test_by_its_cgroup(self, world, monkeypatch):
        def register(role, cgroup):
            raise ProxyRefused(f"cgroup {cgroup.path} is the agent's")

        monkeypatch.setattr(world.proxies, "_register", register)
        assert "agent's" in await self.refused(world, api.encode(api.Hello(api.Role.NODEPROXY)))


async def test_no_descriptor_stays_here(world):
    world.enrolled.pods = [pod(), pod("other", 8)]
    before = open_sockets()
    for _ in range(3):
        proxy = world.proxy()
        await proxy.greet()
        for _ in range(2):
            await proxy.hear()
        await proxy.say(api.GetSockets(1, "uid-web", 7, api.Purpose.OUTBOUND, 8))
        await proxy.hear()
        proxy.die()
    for _ in range(100):
        await asyncio.sleep(0.02)
        if open_sockets() == before:
            break
    assert open_sockets() == before


async def test_descriptors_that_come_unasked_are_closed(world):
    proxy = world.proxy()
    await proxy.greet()
    reader, writer = os.pipe()
    request = api.encode(api.GetSockets(1, "uid-gone", 7, api.Purpose.OUTBOUND))
    await proxy.connection.send(request, (writer,))
    os.close(writer)
    await proxy.hear()
    assert os.read(reader, 1) == b""
    os.close(reader)


async def test_a_proxy_that_does_not_read_holds_up_nobody(world, monkeypatch):
    monkeypatch.setattr("agent.proxies._SEND_TIMEOUT", 0.1)
    stuck, fine = world.proxy(), world.proxy()
    await stuck.greet()
    await fine.greet(api.Role.L7PROXY)
    big = api.Enroll(**{**_fields(pod()), "name": "x" * 60000})
    for _ in range(60):
        await world.enroll(big)
        await fine.hear()
        if world.proxies.connected()["nodeproxy"] == 0:
            break
    assert world.proxies.connected() == {"nodeproxy": 0, "l7proxy": 1}


async def test_packets_that_are_cut(world):
    proxy = world.proxy()
    await proxy.greet()
    with pytest.raises(seqpacket.PacketError):
        await proxy.connection.send(b"x" * (seqpacket.MAX_MESSAGE + 1))
