"""The controller as a process on a real API server, with the rights that an installation gives it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
import yaml
from cryptography import x509

from controlplane import api
from deploy.crds import definitions
from lab.kubernetes import ControlPlane
from tests.controlplane.cluster import Api, connect
from tests.controlplane.replicas import Follower, Mesh, bearer
from tests.controlplane.support import MeshClient, eventually
from tests.controlplane.test_ca import request

pytestmark = [pytest.mark.privileged, pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="module")]
DEFINITIONS = (
    "authorizationpolicies.security.istio.io",
    "serviceentries.networking.istio.io",
    "httproutes.gateway.networking.k8s.io",
)
DENY = {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["nobody"]}}]}]}
AUTHORIZATION = "/apis/security.istio.io/v1/namespaces/{}/authorizationpolicies"


@pytest.fixture(scope="module")
def server() -> Iterator[ControlPlane]:
    """An API server of our own: definitions come to it, and it is stopped."""
    with ControlPlane() as control_plane:
        crds = [d for d in definitions(("istio", "gateway-api")) if d["metadata"]["name"] in DEFINITIONS]
        control_plane.kubectl(
            "apply", "--server-side", "-f", "-", input=yaml.dump_all(crds, Dumper=yaml.CSafeDumper)
        )
        yield control_plane


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def mesh(server: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    """Two controllers; a test that ends one starts it again."""
    async with connect(server.kubeconfig) as admin:
        mesh = await installed(server, admin, "mesh", tmp_path_factory.mktemp("mesh"))
        try:
            one, two = await asyncio.gather(mesh.start("one"), mesh.start("two"))
            await asyncio.gather(one.ready(), two.ready())
            yield mesh
        finally:
            await mesh.close()


async def installed(server: ControlPlane, admin: Api, namespace: str, folder: Path) -> Mesh:
    await admin.namespace(namespace)
    await admin.namespace("apps", **{"mycel.io/mesh": "enabled"})
    mesh = Mesh(server, admin, namespace, folder)
    mesh.install()
    return mesh


def conditions(manifest: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    found = (manifest.get("status") or {}).get("conditions") or ()
    return {c["type"]: (c["status"], c["reason"], c["message"]) for c in found}


async def test_two_controllers_with_one_root_and_clients_by_their_tokens(mesh: Mesh) -> None:
    one, two = mesh.replicas["one"], mesh.replicas["two"]
    roots = await mesh.roots()
    assert (
        (one.folder / "state/roots.pem").read_bytes()
        == (two.folder / "state/roots.pem").read_bytes()
        == roots
    )
    for component in ("agent", "nodeproxy", "l7proxy"):
        await mesh.pod(f"{component}-1", "node-1", component)
    here = await mesh.admin.pod("here", "node-1", "web", "apps")
    there = await mesh.admin.pod("there", "node-2", "web", "apps")
    tokens = {c: await mesh.token(f"{c}-1", c) for c in ("agent", "nodeproxy", "l7proxy")}
    for replica in (one, two):
        async with replica.channel() as channel:
            call: Any = channel.unary_unary(api.METHOD_SIGN)

            async def sign(component: str, uid: str, call: Any = call) -> api.SignResponse:
                message = api.encode(api.SignRequest(uid, request()))
                data = await call(message, metadata=bearer(tokens[component]), timeout=5)
                return api.decode_sign_response(data)

            async def code(component: str, uid: str, sign: Any = sign) -> grpc.StatusCode:
                with pytest.raises(grpc.aio.AioRpcError) as e:
                    await sign(component, uid)
                return e.value.code()

            signed = await sign("nodeproxy", here["metadata"]["uid"])
            (leaf,) = (x509.load_der_x509_certificate(c) for c in signed.chain)
            leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(roots))
            san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert [n.value for n in san] == ["spiffe://cluster.local/ns/apps/sa/web"]
            denied = grpc.StatusCode.PERMISSION_DENIED
            assert await code("nodeproxy", there["metadata"]["uid"]) is denied, "a pod of another node"
            assert await code("agent", here["metadata"]["uid"]) is denied, "an agent asks for no certificates"
            assert await code("l7proxy", here["metadata"]["uid"]) is denied
        assert await replica.metric("mycel_ca_requests_refused_total") == 1
        assert await replica.metric("mycel_controlplane_callers_refused_total") == 2
        async with replica.client(tokens["agent"], "agent") as client:
            await client.take()
        async with replica.client(tokens["agent"], "nodeproxy") as client:
            with pytest.raises((AssertionError, grpc.aio.AioRpcError)):
                await client.receive()
            assert await client.stream.code() is denied, "an agent is no node proxy"
    assert f"no live pod of UID {there['metadata']['uid']} on node node-1" in one.log()


async def test_a_stream_ends_with_its_pod(mesh: Mesh) -> None:
    one = mesh.replicas["one"]
    await mesh.pod("agent-1", "node-1", "agent")
    async with one.client(await mesh.token("agent-1", "agent")) as client:
        await client.take()
        await mesh.admin.remove_pod("agent-1", mesh.namespace)
        # The pod is itself a workload: its end is an update before it is the end.
        follower = Follower(client)
        async with asyncio.timeout(15):
            await asyncio.wait({follower.task})
        assert await client.stream.code() is grpc.StatusCode.UNAUTHENTICATED


class Watched:
    """A policy object: what its status says, and that nothing is written without need."""

    def __init__(self, mesh: Mesh, path: str) -> None:
        self.mesh = mesh
        self.path = path

    async def get(self) -> dict[str, Any]:
        return await self.mesh.admin.client.get(self.path)

    async def says(self, **wanted: tuple[str, str]) -> dict[str, Any]:
        """Wait until conditions have this status and reason, for this generation; the object."""
        found: dict[str, Any] = {}

        async def probe() -> bool:
            nonlocal found
            found = await self.get()
            have = conditions(found)
            observed = {
                c.get("observedGeneration")
                for c in (found.get("status") or {}).get("conditions") or ()
                if c["type"] in wanted
            }
            return observed == {found["metadata"]["generation"]} and all(
                have.get(k, ("", "", ""))[:2] == v for k, v in wanted.items()
            )

        try:
            await eventually(probe, 15)
        except TimeoutError:
            raise AssertionError(f"{wanted} is not said: {found.get('status')}") from None
        return found


@pytest_asyncio.fixture(loop_scope="module")
async def nodes(mesh: Mesh) -> AsyncIterator[list[Follower]]:
    """Two nodes: the first's agent is connected to one controller, the second's to the other."""
    followers = []
    await mesh.remove_pods()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(mesh.remove_pods)
        for number, replica in enumerate(mesh.replicas.values(), 1):
            await mesh.pod(f"agent-{number}", f"node-{number}", "agent")
            token = await mesh.token(f"agent-{number}", "agent")
            follower = Follower(await stack.enter_async_context(replica.client(token)))
            followers.append(follower)
            stack.push_async_callback(follower.stop)
        yield followers


async def make(mesh: Mesh, name: str, spec: dict[str, Any]) -> Watched:
    path = AUTHORIZATION.format("apps")
    body = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": "apps"},
        "spec": spec,
    }
    await mesh.admin.client.create(path, body)
    return Watched(mesh, f"{path}/{name}")


async def test_programmed_when_every_node_has_it(mesh: Mesh, nodes: list[Follower]) -> None:
    policy = await make(mesh, "one", DENY)
    try:
        there = await policy.says(Accepted=("True", "Accepted"), Programmed=("True", "Programmed"))
        assert there["status"]["observedGeneration"] == 1
        # The node that is connected to the other controller takes its time.
        nodes[1].go.clear()
        await mesh.admin.client.patch(policy.path, {"spec": {"action": "ALLOW"}})
        there = await policy.says(Accepted=("True", "Accepted"), Programmed=("False", "Pending"))
        assert conditions(there)["Programmed"][2] == "waiting for node-2 agent"
        since = {c["type"]: c["lastTransitionTime"] for c in there["status"]["conditions"]}
        nodes[1].go.set()
        there = await policy.says(Accepted=("True", "Accepted"), Programmed=("True", "Programmed"))
        assert {c["type"]: c["lastTransitionTime"] for c in there["status"]["conditions"]}[
            "Accepted"
        ] == since["Accepted"]
        # And the one of this controller.
        nodes[0].go.clear()
        await mesh.admin.client.patch(policy.path, {"spec": {"action": "DENY"}})
        there = await policy.says(Programmed=("False", "Pending"))
        assert conditions(there)["Programmed"][2] == "waiting for node-1 agent"
        nodes[0].go.set()
        await policy.says(Programmed=("True", "Programmed"))
        # Both controllers show it alike.
        for replica in mesh.replicas.values():
            (row,) = [r for r in await replica.page("/debug/status") if r["name"] == "one"]
            assert (row["state"], row["generation"]) == ("programmed", 3)
    finally:
        await mesh.admin.client.delete(policy.path)


async def test_a_node_that_should_be_there_is_waited_for(mesh: Mesh, nodes: list[Follower]) -> None:
    await mesh.pod("nodeproxy-1", "node-1", "nodeproxy")
    policy = await make(mesh, "two", DENY)
    try:
        there = await policy.says(Programmed=("False", "Pending"))
        assert conditions(there)["Programmed"][2] == "waiting for node-1 nodeproxy (not connected)"
        token = await mesh.token("nodeproxy-1", "nodeproxy")
        async with mesh.replicas["two"].client(token, "nodeproxy") as client:
            proxy = Follower(client)
            await policy.says(Programmed=("True", "Programmed"))
            await proxy.stop()
        version = (await policy.get())["metadata"]["resourceVersion"]
        await asyncio.sleep(1.5)
        assert (await policy.get())["metadata"]["resourceVersion"] == version, "what was programmed stays so"
    finally:
        await mesh.admin.client.delete(policy.path)


async def test_a_node_whose_agent_is_replaced_is_waited_for(mesh: Mesh, nodes: list[Follower]) -> None:
    """Its kernel judges by what it had, until the next agent is there."""
    client, pods = mesh.admin.client, "/api/v1/namespaces/apps/pods"
    await mesh.admin.pod("runs", "node-2", "web", "apps")
    status = {"phase": "Running", "podIP": "10.2.0.9", "podIPs": [{"ip": "10.2.0.9"}]}
    await client.patch(f"{pods}/runs/status", {"status": status})
    await mesh.admin.remove_pod("agent-2", mesh.namespace)
    async with asyncio.timeout(15):
        await asyncio.wait({nodes[1].task})
    policy = await make(mesh, "seven", DENY)
    try:
        there = await policy.says(Programmed=("False", "Pending"))
        assert conditions(there)["Programmed"][2] == "waiting for node-2 agent (not connected)"
        await mesh.pod("agent-2b", "node-2", "agent")
        async with mesh.replicas["two"].client(await mesh.token("agent-2b", "agent")) as successor:
            follower = Follower(successor)
            await policy.says(Programmed=("True", "Programmed"))
            await follower.stop()
    finally:
        await client.delete(policy.path)
        await mesh.admin.remove_pod("runs", "apps")


async def test_refused_says_why_and_the_last_good_version_stays(mesh: Mesh, nodes: list[Follower]) -> None:
    policy = await make(mesh, "three", DENY)
    try:
        await policy.says(Programmed=("True", "Programmed"))
        wrong = {"rules": [{"to": [{"operation": {"ports": ["not a port"]}}]}]}
        await mesh.admin.client.patch(policy.path, {"spec": wrong})
        there = await policy.says(Accepted=("False", "Invalid"), Programmed=("False", "Invalid"))
        said = conditions(there)
        assert "spec.rules[0].to[0].operation.ports" in said["Accepted"][2]
        assert "last good version" in said["Programmed"][2]
        assert "authorization/apps/three" in nodes[0].client.state
        await mesh.admin.client.patch(policy.path, {"spec": DENY})
        await policy.says(Accepted=("True", "Accepted"), Programmed=("True", "Programmed"))
    finally:
        await mesh.admin.client.delete(policy.path)


async def test_what_is_not_compiled_is_never_accepted(mesh: Mesh, nodes: list[Follower]) -> None:
    client = mesh.admin.client
    routes = "/apis/gateway.networking.k8s.io/v1/namespaces/apps/httproutes"
    entries = "/apis/networking.istio.io/v1/namespaces/apps/serviceentries"
    policies = "/apis/networking.k8s.io/v1/namespaces/apps/networkpolicies"
    parents = [
        {"group": "", "kind": "Service", "name": "web", "port": 80},
        {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "somebody-elses"},
    ]
    await client.create(
        routes,
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": "route"},
            "spec": {"parentRefs": parents, "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]},
        },
    )
    spec = {
        "hosts": ["example.com"],
        "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}],
        "resolution": "DNS",
    }
    await client.create(
        entries,
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "ServiceEntry",
            "metadata": {"name": "entry"},
            "spec": spec,
        },
    )
    await client.create(
        policies,
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "policy"},
            "spec": {"podSelector": {}},
        },
    )
    try:
        await Watched(mesh, f"{entries}/entry").says(
            Accepted=("False", "NotCompiled"), Programmed=("False", "NotCompiled")
        )

        async def route_says() -> bool:
            return bool(((await client.get(f"{routes}/route")).get("status") or {}).get("parents"))

        await eventually(route_says)
        (parent,) = (await client.get(f"{routes}/route"))["status"]["parents"]
        assert parent["controllerName"] == "mycel.io/controller"
        assert parent["parentRef"] == parents[0], "the other parent is somebody else's to serve"
        said = {c["type"]: (c["status"], c["reason"], c["observedGeneration"]) for c in parent["conditions"]}
        assert said["Accepted"] == ("False", "NotCompiled", 1)
        assert said["ResolvedRefs"][0] == "Unknown"

        async def events() -> list[dict[str, Any]]:
            found = await client.list("/apis/events.k8s.io/v1/namespaces/apps/events")
            return [e for e in found["items"] if e["regarding"]["name"] == "policy"]

        async def told() -> bool:
            return bool(await events())

        await eventually(told)
        await asyncio.sleep(1.0)
        (event,) = await events()
        # This kind is in force, and has no status to say so in.
        assert (event["reason"], event["type"]) == ("Programmed", "Normal")
        assert event["regarding"]["uid"] == (await client.get(f"{policies}/policy"))["metadata"]["uid"]
        # Another leader does not say it again.
        leader = mesh.replicas[await mesh.lease_holder()]
        await leader.end()
        await asyncio.sleep(4.0)
        assert len(await events()) == 1
        await leader.start()
        await leader.ready()
    finally:
        for path in (f"{routes}/route", f"{entries}/entry", f"{policies}/policy"):
            await client.delete(path)


async def test_what_others_wrote_stays_and_nothing_goes_round(mesh: Mesh, nodes: list[Follower]) -> None:
    policy = await make(mesh, "four", DENY)
    client = mesh.admin.client
    try:
        there = await policy.says(Programmed=("True", "Programmed"))
        theirs = {
            "type": "Reconciled",
            "status": "True",
            "reason": "Theirs",
            "message": "by somebody else",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
        status = {
            "conditions": [theirs, *there["status"]["conditions"]],
            "validationMessages": [{"level": "INFO"}],
        }
        await client.patch(f"{policy.path}/status", {"status": status})
        await client.patch(policy.path, {"spec": {"action": "ALLOW"}})
        there = await policy.says(Programmed=("True", "Programmed"))
        assert there["status"]["conditions"][0] == theirs
        assert there["status"]["validationMessages"] == [{"level": "INFO"}]
        (leader,) = [r for r in mesh.replicas.values() if await r.metric("mycel_controlplane_leader") == 1]
        await asyncio.sleep(1.0)
        compiled = await leader.metric("mycel_controlplane_compilations_total")
        written = await leader.metric("mycel_controlplane_status_writes_total")
        version = (await policy.get())["metadata"]["resourceVersion"]
        await asyncio.sleep(3.0)
        assert (await policy.get())["metadata"]["resourceVersion"] == version
        assert await leader.metric("mycel_controlplane_status_writes_total") == written
        assert await leader.metric("mycel_controlplane_compilations_total") == compiled
    finally:
        await client.delete(policy.path)


async def test_the_leader_is_killed_and_nothing_changes_in_traffic(mesh: Mesh, nodes: list[Follower]) -> None:
    policy = await make(mesh, "five", DENY)
    try:
        there = await policy.says(Programmed=("True", "Programmed"))
        holder = await mesh.lease_holder()
        (other,) = [r for r in mesh.replicas.values() if r.name != holder]
        staying = nodes[1] if other.name == "two" else nodes[0]
        version = staying.client.version
        began = asyncio.get_running_loop().time()
        await mesh.replicas[holder].kill()

        async def taken_over() -> bool:
            return await mesh.lease_holder() == other.name

        await eventually(taken_over, 25)
        # The lease's 15 seconds from when the other has seen it renewed; each looks every 2.
        assert asyncio.get_running_loop().time() - began <= 20
        assert not staying.task.done(), "its stream lives"
        assert staying.client.version == version
        await asyncio.sleep(1.0)
        assert (await policy.get())["metadata"]["resourceVersion"] == there["metadata"]["resourceVersion"]
        # The new one writes; the node that has lost its controller is missed.
        await mesh.admin.client.patch(policy.path, {"spec": {"action": "ALLOW"}})
        there = await policy.says(Accepted=("True", "Accepted"), Programmed=("False", "Pending"))
        assert "(not connected)" in conditions(there)["Programmed"][2]
        await mesh.replicas[holder].start()
        await mesh.replicas[holder].ready()
    finally:
        await mesh.admin.client.delete(policy.path)


async def test_without_the_api_server(mesh: Mesh, nodes: list[Follower], server: ControlPlane) -> None:
    """Controllers restart in place with root and objects; agents come back with their tokens; then all goes on."""
    policy = await make(mesh, "six", DENY)
    await policy.says(Programmed=("True", "Programmed"))
    version = nodes[0].client.version
    token = await mesh.token("agent-1", "agent")
    roots = await mesh.roots()
    one = mesh.replicas["one"]
    await one.end()
    service = server.service("kube-apiserver")
    await asyncio.to_thread(service.stop)
    try:
        await one.start()
        await one.ready()
        assert (one.folder / "state/roots.pem").read_bytes() == roots
        async with grpc.aio.secure_channel(
            f"{one.address}:{mesh.port}",
            grpc.ssl_channel_credentials(roots),
            options=[("grpc.ssl_target_name_override", f"mycel-controlplane.{mesh.namespace}.svc")],
        ) as channel:
            client = MeshClient(channel, metadata=bearer(token))
            await client.hello("agent", version)
            update = await client.take(timeout=10)
            assert (update.version, update.complete, update.upserts) == (version, False, ())
        assert not nodes[1].task.done()
    finally:
        await asyncio.to_thread(service.start)
        await asyncio.to_thread(server.wait_ready)
    await mesh.admin.client.patch(policy.path, {"spec": {"action": "ALLOW"}})

    async def changed() -> bool:
        return nodes[1].client.version != version

    await eventually(changed, 20)
    await mesh.admin.client.delete(policy.path)


async def test_a_broken_root_is_not_written_over(mesh: Mesh, tmp_path: Path) -> None:
    mesh = await installed(mesh.server, mesh.admin, "broken", tmp_path)
    path = f"/api/v1/namespaces/{mesh.namespace}/secrets/mycel-ca"
    await mesh.admin.client.patch(path, {"data": {"root.pem": "eA=="}})
    one = await mesh.start("one")
    assert one.process is not None
    assert await asyncio.wait_for(one.process.wait(), 20) == 1
    assert f"Secret {mesh.namespace}/mycel-ca: root.key is missing beside the other" in one.log()
    assert (await mesh.secret())["data"] == {"root.pem": "eA=="}
