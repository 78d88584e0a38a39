"""The node's owner of state, with a kernel that only remembers and namespaces that are files."""

import asyncio
import contextlib
import os
import threading
import time

import msgspec
import pytest

from agent import api, passage, reconciler
from agent.identities import Label
from agent.kernel import Connection, Direction, FlowCounters, FlowKey, MapFullError, Pressure
from agent.kernel.model import Via
from agent.mesh import Mesh
from agent.namespaces import Namespaces
from agent.node import Node
from agent.pods import Attachment, AttachmentKey, Refusal
from agent.programmer import Programmer
from agent.state import IDENTITIES_FILE, MESH_FILE, PODS_FILE
from agent.storage import Storage
from agent.sweeper import Sweeper
from agent.verdicts import allowed
from bpf.wire import IDENTITY_PROBE
from controlplane.api import (
    Action,
    Authorization,
    Endpoint,
    MeshConfig,
    MtlsMode,
    Resource,
    ResourceError,
    Rule,
    Service,
    ServicePort,
    Source,
    Update,
)
from tests.agent.fakes import FakeKernel
from tests.agent.pods import complete, last_good, workload


class FileNamespaces(Namespaces):
    """A namespace is a file: its cookie is a thousand more than its inode number."""

    async def look(self, netns):
        return os.fstat(netns).st_ino + 1000, ["lo", "eth0"]

    async def find(self, cookie, inode, path):
        if not path.exists() or path.stat().st_ino + 1000 != cookie:
            return False
        fd = os.open(path, os.O_RDONLY)
        self.hold(cookie, fd)
        os.close(fd)
        return True


class Told:
    """In the proxies' place."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.transcript: list[str] = []

    async def enroll(self, pod: api.Enroll) -> None:
        # The kernel has the pod and its policy before any proxy hears of it.
        assert self.kernel.policy(pod.netns_cookie) is not None
        self.transcript.append(f"enroll {pod.name} {pod.version}")

    async def withdraw(self, uid, netns_cookie, *, drain=False) -> None:
        self.transcript.append(f"{'drain' if drain else 'withdraw'} {uid}")


class World:
    def __init__(self, tmp_path, kernel: FakeKernel | None = None) -> None:
        self.folder = tmp_path
        self.kernel = kernel or FakeKernel()
        self.boot = "boot-1"
        self.node = self.made()

    def made(self) -> Node:
        namespaces = FileNamespaces()
        node = Node(
            "n1",
            storage=Storage(self.folder / "state"),
            programmer=Programmer(self.kernel, namespaces),
            namespaces=namespaces,
            sweeper=Sweeper(self.kernel, namespaces, str),
            boot=self.boot,
        )
        self.namespaces = namespaces
        self.told = Told(self.kernel)
        node.tell(self.told)
        return node

    async def restart(self) -> list[str]:
        """As another process; what the new one writes into the kernel."""
        await self.node.stop()
        self.kernel.calls.clear()
        self.node = self.made()
        await self.node.start()
        return self.kernel.calls

    def netns(self, name: str) -> str:
        path = self.folder / f"netns-{name}"
        path.touch()
        return str(path)

    def cookie(self, name: str) -> int:
        return os.stat(self.netns(name)).st_ino + 1000

    async def add(self, name: str, address: str = "10.0.1.1", **more) -> None:
        path = self.netns(more.pop("netns", name))
        fields = {"container_id": f"c-{name}", "ifname": "eth0", "network": "pods", "netns_path": path} | more
        pod = {"pod_uid": f"uid-{name}", "pod_namespace": "default", "pod_name": name} | more
        addresses = {"addresses": (address,)} | more
        fd = os.open(path, os.O_RDONLY)
        try:
            await self.node.cni.add(Attachment(**(fields | pod | addresses)), fd)
        finally:
            os.close(fd)

    async def delete(self, name: str) -> None:
        await self.node.cni.delete(AttachmentKey(f"c-{name}", "eth0"))

    def held(self) -> set[str]:
        """The namespaces that this process keeps open."""
        targets = set()
        for fd in os.listdir("/proc/self/fd"):
            # Threads close theirs meanwhile.
            with contextlib.suppress(FileNotFoundError):
                targets.add(os.readlink(f"/proc/self/fd/{fd}"))
        return {target for target in targets if target.startswith(f"{self.folder}/netns-")}

    def pod_policy(self, name: str):
        return self.kernel.policy(self.cookie(name))


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.node.start()
    yield made
    await made.node.stop()
    made.kernel.close()


async def test_an_enrolled_pod_is_in_the_kernel_and_told_when_add_returns(world):
    await world.node.apply(complete(workload("web"), workload("client")))
    world.kernel.calls.clear()
    await world.add("web")
    cookie = world.cookie("web")
    number = world.node.tables.identities["uid-web"]
    assert world.kernel.calls == [f"add pod {cookie} 10.0.1.1 {number}", f"policy {cookie} generation 1"]
    assert world.told.transcript == ["enroll web unknown"]
    assert [pod.name for pod in world.node.enrolled()] == ["web"]
    await world.delete("web")
    assert world.kernel.pods() == {}
    assert world.told.transcript[1:] == ["withdraw uid-web"]
    assert world.node.enrolled() == ()
    assert world.held() == set()
    await world.delete("web")


async def until(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


class TestPassage:
    """A pod that runs already joins, and leaves."""

    @pytest.fixture(autouse=True)
    def hurry(self, monkeypatch):
        monkeypatch.setattr(passage, "SETTLE", 0.1)
        monkeypatch.setattr(passage, "LAST_CALL", 0.05)
        monkeypatch.setattr(passage, "POLL", 0.01)

    async def staged(self, world, name, *, passing, open):
        pods = world.kernel.pods
        cookie = world.cookie(name)
        await until(lambda: cookie in pods() and pods()[cookie][3:5] == (passing, open))

    async def gone(self, world):
        await until(lambda: not world.kernel.pods())

    def listen(self, world, address="10.0.1.1"):
        for kind in (api.ListenerKind.OUTBOUND, api.ListenerKind.HBONE):
            world.kernel.fake_listeners[address, kind.port] = (0, 0)

    async def test_it_is_captured_when_the_proxies_listen_and_judged_when_others_know(self, world):
        await world.node.apply(complete(workload("web", enrolled=False)))
        await world.add("web")
        assert world.kernel.pods() == {}
        assert world.told.transcript == []
        await world.node.apply(Update(2, "v2", upserts=(workload("web"),)))
        await self.staged(world, "web", passing=True, open=True)
        assert world.told.transcript == ["enroll web unknown"]
        await asyncio.sleep(0.3)
        await self.staged(world, "web", passing=True, open=True)  # nobody listens yet
        self.listen(world)
        await self.staged(world, "web", passing=False, open=True)
        await self.staged(world, "web", passing=False, open=False)

    async def test_it_leaves_the_same_way_and_its_policy_stays_until_then(self, world):
        await world.node.apply(complete(workload("web")))
        await world.add("web")
        await self.staged(world, "web", passing=False, open=False)
        world.kernel.calls.clear()
        await world.node.apply(Update(2, "v2", upserts=(workload("web", enrolled=False),)))
        await self.staged(world, "web", passing=False, open=True)
        await self.staged(world, "web", passing=True, open=True)
        assert world.told.transcript == ["enroll web unknown"]
        await self.gone(world)
        assert not [call for call in world.kernel.calls if call.startswith("policy")]
        await until(lambda: world.told.transcript[1:])
        assert world.told.transcript[1:] == ["drain uid-web"]
        assert not world.kernel.peers()["10.0.1.1"].enrolled
        # What it had open ends with it.
        assert world.node.attached("uid-web", world.cookie("web"))
        await world.delete("web")
        assert world.told.transcript[2:] == ["withdraw uid-web"]
        assert not world.node.attached("uid-web", world.cookie("web"))

    async def test_one_that_changes_its_mind_goes_back(self, world):
        await world.node.apply(complete(workload("web")))
        await world.add("web")
        self.listen(world)
        await world.node.apply(Update(2, "v2", upserts=(workload("web", enrolled=False),)))
        await self.staged(world, "web", passing=False, open=True)
        await world.node.apply(Update(3, "v3", upserts=(workload("web"),)))
        await self.staged(world, "web", passing=False, open=False)
        assert world.told.transcript == ["enroll web unknown"]

    async def test_a_restarted_agent_goes_on_where_it_was(self, world):
        await world.node.apply(complete(workload("web", enrolled=False)))
        await world.add("web")
        await world.node.apply(Update(2, "v2", upserts=(workload("web"),)))
        await self.staged(world, "web", passing=True, open=True)
        await world.restart()
        await self.staged(world, "web", passing=True, open=True)
        self.listen(world)
        await self.staged(world, "web", passing=False, open=False)

    async def test_one_that_the_kernel_has_lost_is_enrolled_at_once(self, world):
        await world.node.apply(complete(workload("web")))
        await world.add("web")
        world.kernel.fake_pods.clear()
        world.kernel.fake_policies.clear()
        await world.restart()
        await self.staged(world, "web", passing=False, open=False)

    async def test_pods_of_other_nodes_may_be_behind_for_a_while(self, world, monkeypatch):
        monkeypatch.setattr("agent.reconciler.GRACE", 0.3)
        await world.node.apply(complete(workload("far", addresses=("10.0.2.1",), node="n2", enrolled=False)))
        new = workload("new", addresses=("10.0.2.2",), node="n2")
        await world.node.apply(
            Update(2, "v2", upserts=(workload("far", addresses=("10.0.2.1",), node="n2"), new))
        )
        peers = world.kernel.peers
        assert peers()["10.0.2.1"].joining
        assert not peers()["10.0.2.2"].joining  # it came by ADD, and never spoke plain text
        await until(lambda: not peers()["10.0.2.1"].joining)
        assert peers()["10.0.2.1"].enrolled

    async def test_pods_of_other_nodes_that_leave_are_dialled_by_the_mesh_for_a_moment(
        self, world, monkeypatch
    ):
        """Their own node, which judges plain text until then, may hear of it later than this one."""
        monkeypatch.setattr("agent.api.LINGER", 0.3)
        far = workload("far", addresses=("10.0.2.1",), node="n2")
        left = workload("far", addresses=("10.0.2.1",), node="n2", enrolled=False)
        peers = world.kernel.peers
        await world.node.apply(complete(far))
        await world.node.apply(Update(2, "v2", upserts=(left,)))
        assert peers()["10.0.2.1"].enrolled
        assert peers()["10.0.2.1"].joining  # its plain text is judged as anybody's
        await until(lambda: not peers()["10.0.2.1"].enrolled)
        assert not peers()["10.0.2.1"].joining
        # One that changes its mind is in the mesh, and stays in it.
        await world.node.apply(Update(3, "v3", upserts=(far,)))
        await world.node.apply(Update(4, "v4", upserts=(left,)))
        await world.node.apply(Update(5, "v5", upserts=(far,)))
        await asyncio.sleep(0.4)
        assert peers()["10.0.2.1"].enrolled


async def test_add_waits_for_the_controller(world, monkeypatch):
    adding = asyncio.create_task(world.add("web"))
    await asyncio.sleep(0.05)
    assert not adding.done()
    await world.node.apply(complete(workload("other")))
    await asyncio.sleep(0.05)
    assert not adding.done()
    await world.node.apply(Update(2, "v2", upserts=(workload("web"),)))
    await adding
    assert world.pod_policy("web") is not None
    monkeypatch.setattr("agent.attaching.WORKLOAD_TIMEOUT", 0.05)
    with pytest.raises(Refusal) as refused:
        await world.add("never")
    assert refused.value.code == 11
    assert "does not know it" in refused.value.details


async def test_a_pod_that_was_outside_waits_for_the_word_of_now(world):
    """A node that was off has an old word: what joined meanwhile would start in plain text."""
    await world.node.apply(complete(workload("web", enrolled=False), workload("in")))
    await world.restart()
    await world.add("in", "10.0.1.2")  # nothing could be worse for it than to be in
    adding = asyncio.create_task(world.add("web"))
    await asyncio.sleep(0.05)
    assert not adding.done()
    await world.node.apply(Update(2, "v2", upserts=(workload("web"),)))
    await adding
    assert world.pod_policy("web") is not None
    assert world.kernel.pods()[world.cookie("web")][3:5] == (False, False)
    await world.delete("web")
    await world.node.apply(Update(3, "v3", upserts=(workload("web", enrolled=False),)))
    await world.add("web")  # from then on at once


async def test_but_not_for_long(world, monkeypatch):
    await world.node.apply(complete(workload("web", enrolled=False)))
    monkeypatch.setattr("agent.attaching.FRESH", 0.05)
    await world.restart()
    await world.add("web")
    assert world.kernel.pods() == {}


async def test_pods_outside_start_without_a_controller(world, monkeypatch):
    """As they do without an agent; one that should have been in the mesh comes in as it runs."""
    monkeypatch.setattr("agent.attaching.WORKLOAD_TIMEOUT", 0.05)
    config = MeshConfig(outside_namespaces=("plain", "default"))
    await world.node.apply(Update(1, "v1", complete=True, upserts=(config, workload("web"))))
    await world.add("new", "10.0.1.2", pod_namespace="plain")
    assert world.kernel.pods() == {}
    assert len(world.node.pods) == 0
    assert world.held() == set()
    netns = os.open(world.netns("new"), os.O_RDONLY)
    passed = Attachment("c-new", "eth0", pod_uid="uid-new", pod_namespace="plain", pod_name="new")
    await world.node.cni.check(passed, netns)  # CRI-O asks when it starts
    with pytest.raises(Refusal, match="never added"):
        await world.node.cni.check(msgspec.structs.replace(passed, pod_namespace="default"), netns)
    os.close(netns)
    await world.delete("new")
    for namespace in ("default", "other"):  # one has a pod of the mesh, one is not known
        with pytest.raises(Refusal, match="is not known") as refused:
            await world.add("new", "10.0.1.2", pod_namespace=namespace)
        assert refused.value.code == 11
    await world.node.apply(Update(2, "v2", upserts=(workload("new", addresses=("10.0.1.2",)),)))
    assert [candidate.uid for candidate in world.node.candidates()] == ["uid-new"]


async def test_a_pod_that_is_removed_while_add_waits_is_never_attached(world):
    adding = asyncio.create_task(world.add("web"))
    await asyncio.sleep(0.05)
    await world.delete("web")
    await world.node.apply(complete(workload("web")))
    with pytest.raises(Refusal, match="removed while") as refused:
        await adding
    assert refused.value.code == 11
    assert len(world.node.pods) == 0
    assert world.held() == set()
    # The next try is another one.
    await world.add("web")
    assert world.pod_policy("web") is not None


async def test_a_pod_that_the_controller_takes_back_while_add_waits_does_not_start(world, monkeypatch):
    """Its other replica may be behind: the pod would run outside of the mesh until that catches up."""
    await world.node.apply(complete(workload("web"), workload("other")))
    write = Storage.write
    updates: list[asyncio.Future[object]] = []

    def meanwhile(self, name, data, **how):
        if name == PODS_FILE and not updates:
            updates.append(asyncio.ensure_future(world.node.apply(complete(workload("other"), version="v2"))))
        write(self, name, data, **how)

    monkeypatch.setattr(Storage, "write", meanwhile)
    with pytest.raises(Refusal, match="could not be programmed") as refused:
        await world.add("web")
    assert refused.value.code == 11
    await asyncio.gather(*updates)
    assert len(world.node.pods) == 0
    assert world.held() == set()
    await world.node.apply(complete(workload("web"), version="v3"))
    await world.add("web")
    assert world.pod_policy("web") is not None


async def test_a_static_pod_is_known_by_its_mirror(world, monkeypatch):
    """Kubelet gives it a UID of its own, which no controller ever hears of."""
    static = "0123456789abcdef0123456789abcdef"
    monkeypatch.setattr("agent.attaching.WORKLOAD_TIMEOUT", 0.05)
    with pytest.raises(Refusal, match="is not known"):
        await world.add("web", pod_uid=static)
    await world.node.apply(
        complete(
            workload("web"),
            workload("outside", enrolled=False, addresses=("10.0.1.2",)),
            workload("elsewhere", node="n2"),
        )
    )
    await world.add("web", pod_uid=static)
    assert world.pod_policy("web") is not None
    assert [pod.uid for pod in world.node.enrolled()] == ["uid-web"]
    await world.add("outside", "10.0.1.2", pod_uid=static.replace("0", "a"))
    for name in ("elsewhere", "nobody"):
        with pytest.raises(Refusal, match="is not known"):
            await world.add(name, pod_uid=static.replace("0", "b"))
    # Only kubelet's own: a pod that was made again under its name is another one.
    with pytest.raises(Refusal, match="is not known"):
        await world.add("web", pod_uid="4c1f8f8e-7f0a-4c0e-9e55-0123456789ab")
    await world.delete("web")
    await world.delete("outside")
    assert world.kernel.pods() == {}


async def test_a_full_disk_keeps_numbers_out_of_the_kernel_and_pods_not_in_it(world, monkeypatch):
    await world.node.apply(complete(workload("web")))
    await world.add("web")
    write = Storage.write

    def full(self, name, data, **_how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Storage, "write", full)
    await world.delete("web")
    assert world.kernel.pods() == {}
    assert world.held() == set()
    for _ in range(2):  # also at the second try
        errors = await world.node.apply(complete(workload("web"), workload("new")))
        assert "No space left" in errors[0].reason
        assert "uid-new" not in world.node.tables.identities
    with pytest.raises(Refusal, match="book of pods cannot be written") as refused:
        await world.add("web")
    assert refused.value.code == 11
    running = Attachment(
        "running/uid-web", "eth0", pod_uid="uid-web", addresses=("10.0.1.1",), netns_cookie=1
    )
    netns = os.open(world.netns("web"), os.O_RDONLY)
    with pytest.raises(OSError, match="No space left"):
        await world.node.attach_running(running, netns)
    os.close(netns)
    assert len(world.node.pods) == 0
    assert world.held() == set()
    monkeypatch.setattr(Storage, "write", write)
    assert await world.node.apply(complete(workload("web"), workload("new"))) == ()
    assert b'"next"' in world.node.state._storage.read(IDENTITIES_FILE)


async def test_nobody_is_known_before_the_controller_spoke(world, monkeypatch):
    monkeypatch.setattr("agent.attaching.WORKLOAD_TIMEOUT", 0.05)
    with pytest.raises(Refusal) as refused:
        await world.add("web")
    assert refused.value.code == 11
    assert "has not said anything" in refused.value.details
    with pytest.raises(Refusal) as refused:
        await world.node.cni.status()
    assert refused.value.code == 50


async def test_status_is_about_room_for_pods(world):
    """A map that forgets by itself is always full, and one that a port scanner filled costs no pod."""
    await world.node.apply(complete())
    for name in ("recent", "affinity", "refused", "flows", "connecting"):
        world.kernel.map_pressure[name] = Pressure(8192, 8192, 1)
    await world.node.cni.status()
    for name in ("pods", "policies", "peers", "listeners", "interfaces", "shares"):
        world.kernel.map_pressure[name] = Pressure(8192, 8192, 1)
        with pytest.raises(Refusal, match="no room for another pod") as refused:
            await world.node.cni.status()
        assert refused.value.code == 50
        assert refused.value.details == f"full: {name}"
        world.kernel.map_pressure[name] = Pressure(8191, 8192, 1)


async def test_a_new_identity_is_in_every_table_before_its_pod_runs(world):
    policy = Authorization(
        "default", "p", Action.ALLOW, (Rule((Source(principals=("cluster.local/ns/default/sa/client",)),)),)
    )
    await world.node.apply(complete(workload("server", policies=("default/p",)), policy))
    await world.add("server")
    await world.node.apply(Update(2, "v2", upserts=(workload("client"), workload("other"))))
    await world.add("client", "10.0.1.2")
    _, table = world.pod_policy("server")
    assert table == {(world.node.tables.identities["uid-client"], 0): True, (IDENTITY_PROBE, 0): True}


class FewPeers(FakeKernel):
    """Has room for three."""

    def set_peer(self, address, peer):
        if len(self.fake_peers | {address: peer}) > 3:
            raise MapFullError(7, f"peer {address}: no room for another element")
        super().set_peer(address, peer)


async def test_who_is_in_the_mesh_is_known_before_who_is_not(tmp_path):
    """An enrolled peer that has no room would be dialled in plain text; of another only the name is lost."""
    world = World(tmp_path, FewPeers())
    await world.node.start()
    far = [workload(f"p{n}", addresses=(f"10.0.2.{n}",), node="n2", enrolled=n % 2 == 0) for n in range(5)]
    for order, version in ((far, "v1"), (far[::-1], "v2")):
        errors = await world.node.apply(complete(*order, version=version))
        peers = world.kernel.peers()
        assert {address for address, peer in peers.items() if peer.enrolled} == {
            "10.0.2.0",
            "10.0.2.2",
            "10.0.2.4",
        }
        assert {error.key for error in errors} <= {"workload/uid-p1", "workload/uid-p3"}
    more = workload("p6", addresses=("10.0.2.6",), node="n2")
    [*_, error] = sorted(await world.node.apply(Update(3, "v3", upserts=(more,))), key=lambda e: e.key)
    assert error.key == "workload/uid-p6"
    await world.node.stop()
    world.kernel.close()


async def test_only_differences_are_written(world):
    service = Service(
        "default",
        "web",
        "web.default",
        ("10.96.0.1",),
        (ServicePort(80, endpoints=(Endpoint("u", "10.0.1.1", 80, "n1"),)),),
    )
    resources: list[Resource] = [
        workload("web"),
        workload("far", node="n2", addresses=("10.0.2.1",)),
        service,
    ]
    await world.node.apply(complete(*resources))
    await world.add("web")
    world.kernel.calls.clear()
    await world.node.apply(complete(*resources, version="v2", nonce=2))
    assert world.kernel.calls == []
    await world.node.apply(Update(3, "v3", upserts=(workload("far", node="n2", addresses=("10.0.2.2",)),)))
    assert world.kernel.calls == ["peer 10.0.2.2 enrolled", "no peer 10.0.2.1"]
    world.kernel.calls.clear()
    await world.node.apply(Update(4, "v4", removes=("service/default/web",)))
    assert world.kernel.calls == ["no service 10.96.0.1:80"]


@pytest.mark.parametrize(
    ("given", "own"),
    [
        (("fd00::1:1", "10.0.1.1"), ("10.0.1.1", "fd00::1:1")),
        (("fe80::1", "fd00::1:1"), ("fd00::1:1",)),
        (("10.0.1.1", "10.0.1.2", "fd00::1:1", "fd00::1:2"), ("10.0.1.1", "fd00::1:1")),
    ],
    ids=["dual-stack", "ipv6-only", "several"],
)
async def test_a_pod_has_one_address_of_each_family(world, given, own):
    await world.node.apply(complete(workload("web", addresses=given)))
    await world.add("web", addresses=given)
    assert world.kernel.pods()[world.cookie("web")].addresses == own
    [told] = world.node.enrolled()
    assert (told.address, told.addresses) == (own[0], own)
    assert told.own_like("::") == next(address for address in own if ":" in address)
    assert told.own_like("10.9.9.9") == (own[0] if len(own) == 2 else "")


async def test_a_pod_without_an_address_is_refused(world):
    await world.node.apply(complete(workload("web", addresses=())))
    with pytest.raises(Refusal, match="is in the mesh and has no address"):
        await world.add("web", addresses=("fe80::1",))
    assert world.kernel.pods() == {}


async def test_the_same_address_with_another_uid_is_another_pod(world):
    await world.node.apply(
        complete(workload("old", addresses=("10.0.1.1",)), workload("new", service_account="other"))
    )
    await world.add("old", netns="a")
    old = world.kernel.pods()[world.cookie("a")]
    # The new sandbox comes before the old one's DEL.
    await world.add("new", netns="b")
    new = world.kernel.pods()[world.cookie("b")]
    assert new.identity != old.identity
    await world.node.cni.delete(AttachmentKey("c-old", "eth0"))
    assert list(world.kernel.pods().values()) == [new]
    assert world.kernel.peers()["10.0.1.1"].identity == new.identity


async def test_another_sandbox_of_the_same_pod(world):
    await world.node.apply(complete(workload("web")))
    await world.add("web", netns="a")
    await world.add("web", netns="b", container_id="c-second", address="10.0.1.2")
    assert set(world.kernel.pods()) == {world.cookie("a"), world.cookie("b")}
    await world.delete("web")
    assert set(world.kernel.pods()) == {world.cookie("b")}
    # The same container and interface with another namespace, without a DEL between.
    await world.add("web", netns="c", container_id="c-second", address="10.0.1.2")
    assert set(world.kernel.pods()) == {world.cookie("c")}


async def test_a_pod_that_nobody_knows_any_more_is_sealed(world):
    await world.node.apply(complete(workload("web"), workload("client")))
    await world.add("web")
    await world.node.apply(Update(2, "v2", removes=("workload/uid-web",)))
    assert world.pod_policy("web") == (2, {})
    assert list(world.kernel.pods()) == [world.cookie("web")]
    assert world.told.transcript[1:] == ["withdraw uid-web"]
    await world.node.apply(Update(3, "v3", upserts=(workload("web"),)))
    assert world.pod_policy("web")[1] != {}
    assert world.told.transcript[2:] == ["enroll web unknown"]


async def test_a_policy_change_ends_what_it_refuses_twice(world, monkeypatch):
    monkeypatch.setattr("agent.sweeper.SECOND_WALK", 0.05)
    await world.node.apply(complete(workload("web"), workload("client")))
    await world.add("web")

    def connection(port):
        cookie = world.cookie("web")
        return Connection(
            cookie, ("10.0.1.2", port), ("10.0.1.1", 80), 16, 17, Via.DIRECT, 1, False, 0, 0, port
        )

    world.kernel.refused = [connection(1)]
    deny = Authorization("default", "deny", Action.ALLOW, ())
    await world.node.apply(Update(2, "v2", upserts=(deny, workload("web", policies=("default/deny",)))))
    await until(lambda: "destroy 1" in world.kernel.calls)
    # Judged by the old table, established after the swap.
    world.kernel.refused = [connection(2)]
    await until(lambda: world.kernel.calls[-2:] == ["destroy 1", "destroy 2"])


async def test_strict_is_in_force_when_the_update_is_acknowledged(world):
    await world.node.apply(complete(workload("web")))
    await world.add("web")
    assert world.pod_policy("web")[1][0, 0]
    assert await world.node.apply(Update(2, "v2", upserts=(workload("web", mtls=MtlsMode.STRICT),))) == ()
    assert (0, 0) not in world.pod_policy("web")[1]


class TestFailures:
    async def test_what_cannot_be_written_is_named_and_tried_again(self, world, monkeypatch):
        monkeypatch.setattr("agent.reconciler.RETRY", 0.05)
        world.kernel.broken = {"10.0.2.1"}
        bad = workload("bad", addresses=("1.2.3",))
        far = workload("far", node="n2", addresses=("10.0.2.1",))
        errors = await world.node.apply(complete(bad, far))
        assert errors == (
            ResourceError("workload/uid-bad", "addresses: '1.2.3' is no IP address"),
            ResourceError("workload/uid-far", "address 10.0.2.1: [Errno 7] map full at 10.0.2.1"),
        )
        assert "map full" in world.node.problem
        world.kernel.broken.clear()
        await until(lambda: world.node.problem == "")
        assert "10.0.2.1" in world.kernel.peers()

    async def test_add_is_undone_when_the_kernel_fails(self, world):
        await world.node.apply(complete(workload("web")))
        world.kernel.broken = {world.cookie("web")}
        with pytest.raises(Refusal) as refused:
            await world.add("web")
        assert refused.value.code == 11
        assert "is broken" in refused.value.details
        assert len(world.node.pods) == 0
        assert world.told.transcript == []
        assert world.held() == set()
        world.kernel.broken.clear()
        await world.add("web")
        assert world.pod_policy("web") is not None

    async def test_a_broken_policy_keeps_the_pod_from_the_proxies(self, world):
        await world.node.apply(complete(workload("web")))
        world.kernel.broken = {("policy", world.cookie("web"))}
        with pytest.raises(Refusal):
            await world.add("web")
        assert world.told.transcript == []
        assert world.kernel.pods() == {}

    async def test_another_pod_is_not_hindered(self, world):
        await world.node.apply(complete(workload("web"), workload("other")))
        world.kernel.broken = {world.cookie("web")}
        with pytest.raises(Refusal):
            await world.add("web")
        await world.add("other", "10.0.1.2")
        assert list(world.kernel.pods()) == [world.cookie("other")]


class TestRestart:
    async def test_pods_are_adopted_and_nothing_is_written(self, world):
        await world.node.apply(complete(workload("web"), workload("far", node="n2", addresses=("10.0.2.1",))))
        await world.add("web")
        await world.node.apply(Update(2, "v2", upserts=(workload("web", mtls=MtlsMode.STRICT),)))
        before = world.kernel.pods(), world.pod_policy("web"), world.kernel.peers()
        assert await world.restart() == []
        assert (world.kernel.pods(), world.pod_policy("web"), world.kernel.peers()) == before
        assert world.node.mesh.version == "v2"
        assert world.told.transcript == ["enroll web unknown"]
        await world.delete("web")
        assert world.kernel.pods() == {}

    async def test_pods_that_went_meanwhile_are_forgotten(self, world):
        await world.node.apply(complete(workload("web")))
        await world.add("web")
        world.kernel.ended.add(world.cookie("web"))
        os.unlink(world.netns("web"))
        assert [call.split()[0] for call in await world.restart()] == ["remove"]
        assert len(world.node.pods) == 0
        assert [uid for uid, _ in world.node.ended()] == ["uid-web"]

    async def test_nothing_of_another_boot_is_believed(self, world):
        await world.node.apply(complete(workload("web")))
        await world.add("web")
        world.boot = "boot-2"
        world.kernel.ended.add(world.cookie("web"))
        await world.restart()
        assert len(world.node.pods) == 0
        assert world.kernel.pods() == {}

    async def test_a_lost_book_lets_nobody_go_free(self, world, monkeypatch):
        monkeypatch.setattr("agent.reconciler.MAINTENANCE", 0.05)
        await world.node.apply(complete(workload("web"), workload("client")))
        await world.add("web")
        await world.node.stop()
        (world.folder / "state" / PODS_FILE).write_text("broken")
        await world.restart()
        assert list(world.kernel.pods()) == [world.cookie("web")]
        assert world.pod_policy("web") == (2, {})
        assert world.node.enrolled() == ()
        # When it ends, its entry goes; or the runtime attaches it again.
        world.kernel.ended.add(world.cookie("web"))
        await until(lambda: world.kernel.pods() == {})

    async def test_an_orphan_that_is_attached_again_is_itself_again(self, world):
        await world.node.apply(complete(workload("web")))
        await world.add("web")
        await world.node.stop()
        (world.folder / "state" / PODS_FILE).unlink()
        await world.restart()
        await world.add("web")
        assert world.pod_policy("web")[1] != {}
        assert [pod.name for pod in world.node.enrolled()] == ["web"]
        await world.delete("web")
        assert world.kernel.pods() == {}

    async def test_a_namespace_that_is_not_to_be_seen_stays_judged(self, world):
        await world.node.apply(complete(workload("web")))
        await world.add("web")
        cookie = world.cookie("web")
        os.unlink(world.netns("web"))
        await world.restart()
        assert list(world.kernel.pods()) == [cookie]
        await world.node.apply(Update(2, "v2", upserts=(workload("web", mtls=MtlsMode.STRICT),)))
        assert (0, 0) not in world.kernel.policy(cookie)[1]
        await world.delete("web")
        assert world.kernel.pods() == {}

    async def test_without_a_last_good_state_the_kernel_is_left_alone(self, world):
        await world.node.apply(complete(workload("web")))
        await world.add("web")
        await world.node.stop()
        os.unlink(world.folder / "state" / MESH_FILE)
        assert await world.restart() == []
        assert list(world.kernel.pods()) == [world.cookie("web")]
        assert world.node.problem == "the controller has not said anything yet"

    async def test_numbers_are_kept(self, world):
        await world.node.apply(complete(workload("web"), workload("client")))
        before = dict(world.node.tables.identities)
        await world.restart()
        await world.node.apply(
            complete(workload("another"), workload("client"), workload("web"), version="v3")
        )
        assert {uid: world.node.tables.identities[uid] for uid in before} == before

    async def test_lost_numbers_never_come_again(self, world):
        await world.node.apply(complete(workload("web")))
        await world.add("web")
        old = world.kernel.pods()[world.cookie("web")].identity
        await world.node.stop()
        (world.folder / "state" / IDENTITIES_FILE).write_text("{")
        await world.restart()
        assert world.kernel.pods()[world.cookie("web")].identity > old + 1000
        assert (world.folder / "state" / f"{IDENTITIES_FILE}.broken").exists()

    @pytest.mark.parametrize("name", [MESH_FILE, PODS_FILE, IDENTITIES_FILE])
    @pytest.mark.parametrize("damage", ["nonsense", "no UTF-8"])
    async def test_broken_files_are_set_aside(self, world, name, damage):
        await world.node.apply(complete(workload("web")))
        await world.add("web")
        await world.node.stop()
        file = world.folder / "state" / name
        text = file.read_bytes()
        assert b"web" in text
        file.write_bytes(b"\x00broken" if damage == "nonsense" else text.replace(b"web", b"\xffeb"))
        await world.restart()
        assert (world.folder / "state" / f"{name}.broken").exists()
        await world.node.apply(complete(workload("web")))
        assert world.node.problem == ""

    async def test_the_last_good_state_is_private_and_whole(self, world):
        await world.node.apply(complete(workload("web")))
        file = world.folder / "state" / MESH_FILE
        await until(file.exists)
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.read_bytes() == last_good(workload("web")).replace(b"\xa5nonce\x01", b"\xa5nonce\x00")
        assert (world.folder / "state").stat().st_mode & 0o777 == 0o700


class TestPodsThatStart:
    """What holds them is made lasting when they have had time to start."""

    @pytest.fixture(autouse=True)
    def no_links_yet(self, world, monkeypatch):
        monkeypatch.setattr(reconciler, "STARTED", 0.05)
        world.kernel.fake_links = False

    async def linked(self, world, *names):
        """Exactly these, once there can be links."""
        world.kernel.fake_links = True
        await until(lambda: not world.kernel.unlinked())
        calls = [call for call in world.kernel.calls if call.startswith("link pod")]
        assert calls == [f"link pod {world.cookie(name)}" for name in names]

    async def test_one_of_an_add(self, world):
        await world.node.apply(complete(workload("web")))
        await world.add("web")
        assert world.kernel.unlinked() == {world.cookie("web")}
        # Whatever fails is tried again.
        await asyncio.sleep(0.2)
        await self.linked(world, "web")
        # It is one that runs from now on, whatever is written anew.
        await world.node.apply(complete(workload("web", service_account="other")))
        await until(lambda: sum(call.startswith("add pod") for call in world.kernel.calls) == 2)
        assert world.kernel.unlinked() == set()

    async def test_it_is_given_time(self, world, monkeypatch):
        monkeypatch.setattr(reconciler, "STARTED", 0.4)
        world.kernel.fake_links = True
        await world.node.apply(complete(workload("web")))
        before = time.monotonic()
        await world.add("web")
        await until(lambda: not world.kernel.unlinked())
        assert time.monotonic() - before >= 0.4

    async def test_one_that_comes_while_a_pass_is_under_way(self, world, monkeypatch):
        await world.node.apply(complete(workload("web"), workload("other")))
        whole, going = world.kernel.add_pod, threading.Event()

        def slow(pod, *more, **options):
            whole(pod, *more, **options)
            if pod.netns_cookie == world.cookie("web"):
                going.wait(5)

        monkeypatch.setattr(world.kernel, "add_pod", slow)
        first = asyncio.create_task(world.add("web"))
        await until(lambda: world.cookie("web") in world.kernel.pods())
        second = asyncio.create_task(world.add("other", "10.0.1.2"))
        await until(lambda: world.cookie("other") in world.node.pods.sandboxes())
        going.set()
        await asyncio.gather(first, second)
        assert world.kernel.unlinked() == {world.cookie("web"), world.cookie("other")}

    async def test_one_that_runs_when_it_joins(self, world):
        await world.node.apply(complete(workload("web", enrolled=False)))
        await world.add("web")
        await world.node.apply(complete(workload("web")))
        await until(world.kernel.pods)
        assert world.kernel.unlinked() == set()

    async def test_one_that_ends_before(self, world):
        await world.node.apply(complete(workload("web"), workload("other")))
        await world.add("web")
        await world.add("other", "10.0.1.2")
        await world.delete("web")
        await self.linked(world, "other")

    async def test_a_successor_goes_on(self, world):
        await world.node.apply(complete(workload("web")))
        await world.add("web")
        await world.restart()
        await self.linked(world, "web")


async def test_a_changed_label_does_not_cut_old_connections_off(world):
    await world.node.apply(complete(workload("client", version="v1"), workload("web")))
    await world.add("web")
    old = world.node.tables.identities["uid-client"]
    await world.node.apply(Update(2, "v2", upserts=(workload("client", version="v2"),)))
    new = world.node.tables.identities["uid-client"]
    assert new != old
    assert world.node.numbers.label(new) == Label(
        "spiffe://cluster.local/ns/default/sa/client", "client", version="v2"
    )
    _, table = world.pod_policy("web")
    assert allowed(table, old, 80)
    assert allowed(table, new, 80)


async def test_numbers_that_nothing_carries_are_forgotten_and_never_come_again(world, monkeypatch):
    monkeypatch.setattr("agent.reconciler.FORGET", 0.0)
    forget = world.node._reconciler._forget_identities
    numbers = world.node.numbers
    await world.node.apply(complete(workload("web"), *(workload(f"w{n}") for n in range(4))))
    await world.add("web")
    held, counted, gone, back = (world.node.tables.identities[f"uid-w{n}"] for n in range(4))
    world.kernel.accounts = {FlowKey(0, counted, 80, Direction.INBOUND): FlowCounters(1, 1, 0, 0, 0)}
    cookie = world.cookie("web")
    ends = (("10.0.9.1", 1), ("10.0.1.1", 80))
    world.kernel.open_connections = [Connection(cookie, *ends, held, 0, Via.DIRECT, 1, False, 0, 0, 1)]
    await world.node.apply(complete(workload("web"), workload("w3"), version="v2"))
    await forget()
    assert [numbers.label(n) is not None for n in (held, counted, gone, back)] == [True, True, False, True]
    # Once the connection has closed and the account was dropped, they go too; also after a restart.
    world.kernel.open_connections, world.kernel.accounts = [], {}
    await forget()
    assert [numbers.label(n) is not None for n in (held, counted, back)] == [False, False, True]
    await world.restart()
    assert [world.node.numbers.label(n) is not None for n in (held, back)] == [False, True]
    await world.node.apply(complete(workload("web"), workload("w0"), workload("w3"), version="v3"))
    assert world.node.tables.identities["uid-w0"] > max(held, counted, gone, back)
    assert world.node.tables.identities["uid-w3"] == back


async def test_accounts_of_the_past_go_when_there_is_no_room(world):
    await world.node.apply(complete(workload("web")))
    number = world.node.tables.identities["uid-web"]
    zero = FlowCounters(1, 1, 0, 0, 0)
    keys = [
        FlowKey(a, b, 80, Direction.INBOUND)
        for a, b in ((0, number), (number, number), (900, number), (number, 901))
    ]
    world.kernel.accounts = dict.fromkeys(keys, zero)
    world.kernel.map_pressure["flows"] = Pressure(4, 100, 0)
    world.node._programmer.forget_accounts({number})
    assert list(world.kernel.accounts) == keys
    world.kernel.map_pressure["flows"] = Pressure(75, 100, 0)
    world.node._programmer.forget_accounts({number})
    assert list(world.kernel.accounts) == keys[:2]


async def test_shares_of_maps_are_counted_again_from_time_to_time(world, monkeypatch):
    monkeypatch.setattr("agent.reconciler.MAINTENANCE", 0.02)
    await world.restart()
    await until(lambda: world.kernel.share_counts > 1)


async def test_a_load_that_fails_is_tried_again_and_keeps_nothing_else_from_repair(world):
    await world.node.apply(complete(workload("web")))
    await world.add("web")
    loads: list[int] = []

    async def load() -> None:
        loads.append(len(loads))
        if len(loads) == 1:
            raise RuntimeError("no memory for a compiler")
        world.kernel.fake_detached.clear()

    world.node.loads(load)
    world.kernel.fake_detached.append("link_connect4")
    world.kernel.fake_policies.clear()
    world.node.look()
    await until(lambda: loads and world.pod_policy("web") is not None)
    assert world.node.repairs == {"policy": 1}
    world.node.look()
    await until(lambda: world.node.repairs == {"policy": 1, "link": 1})


async def test_roles_that_the_kernel_has_lost_are_given_again(world):
    lost = [1, 0]
    world.node.gives_roles(lambda: lost.pop(0))
    await world.node.apply(complete())
    world.node.look()
    await until(lambda: world.node.repairs == {"role": 1})
    world.node.look()
    await until(lambda: not lost)
    assert world.node.repairs == {"role": 1}


class Listening(Told):
    """Holds listeners, and gets those again that the kernel has lost."""

    async def enroll(self, pod: api.Enroll) -> None:
        await super().enroll(pod)
        for kind in api.ListenerKind:
            self.kernel.fake_listeners.setdefault((pod.address, kind.port), 1)


@pytest.mark.parametrize("kind", api.ListenerKind)
async def test_a_listener_that_the_kernel_has_lost_is_given_again(world, kind):
    service = Service("default", "s", "s.default", ("10.96.0.1",), (ServicePort(80, l7=True),))
    world.node.tell(Listening(world.kernel))
    await world.node.apply(complete(workload("web"), service))
    await world.add("web")
    world.kernel.kill_listener("10.0.1.1", kind.port)
    world.node.look()
    await until(lambda: world.node.repairs == {"listener": 1})
    assert world.kernel.has_listener("10.0.1.1", kind.port)


async def test_where_no_proxy_is_no_listener_was_lost(world):
    await world.node.apply(complete(workload("web")))
    await world.add("web")
    world.told.transcript.clear()
    world.node.look()
    await until(lambda: world.told.transcript == ["enroll web unknown"])
    await world.node.apply(Update(2, "v2"))
    assert world.node.repairs == {}


async def test_pods_that_ran_before_the_plugin_are_named(world):
    await world.node.apply(
        complete(workload("web"), workload("far", node="n2"), workload("out", enrolled=False))
    )
    assert world.node.unattached() == ["default/web"]
    await world.add("web")
    assert world.node.unattached() == []


async def test_many_changes_at_once_are_few_passes(world):
    await world.node.apply(complete(*(workload(f"p{n}") for n in range(50))))
    passes = 0
    real = world.node._reconciler._pass

    async def counted():
        nonlocal passes
        passes += 1
        return await real()

    world.node._reconciler._pass = counted
    await asyncio.gather(*(world.add(f"p{n}", f"10.0.1.{n}") for n in range(50)))
    assert passes < 10
    assert len(world.kernel.pods()) == 50
    assert isinstance(world.node.mesh, Mesh)
