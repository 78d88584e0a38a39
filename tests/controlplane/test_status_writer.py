"""In which order statuses are written. What is written is test_status.py's, the whole way test_on_kubernetes.py's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry

from common.kubernetes import Client
from controlplane.clients import Clients
from controlplane.credentials import Caller
from controlplane.model.findings import Finding
from controlplane.source import Key, Object
from controlplane.status.keeper import Keeper
from controlplane.status.programming import Programming
from controlplane.status.writer import StatusWriter
from tests.controlplane.support import eventually

GROUP = "security.istio.io"


class Server(Client):
    """An API server's policies in memory: what is read of each, and written."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.written: list[str] = []

    def add(self, name: str, **annotations: str) -> None:
        metadata: dict[str, Any] = {"name": name, "namespace": "default", "uid": f"uid-{name}"}
        metadata |= {"generation": 1, "annotations": annotations}
        self.objects[name] = {
            "apiVersion": f"{GROUP}/v1",
            "kind": "AuthorizationPolicy",
            "metadata": metadata | {"resourceVersion": "1"},
            "spec": {},
        }

    async def get(self, path: str, **params: Any) -> dict[str, Any]:
        if path == f"/apis/{GROUP}/v1":
            resource = {"name": "authorizationpolicies", "kind": "AuthorizationPolicy", "namespaced": True}
            status = {"name": "authorizationpolicies/status", "kind": "AuthorizationPolicy"}
            return {"resources": [resource, status]}
        name = path.rpartition("/")[2]
        self.asked.append(name)
        return self.objects[name]

    async def patch(self, path: str, body: Any, content_type: str = "", **params: Any) -> dict[str, Any]:
        name = path.split("/")[-2]
        assert body["metadata"]["resourceVersion"] == self.objects[name]["metadata"]["resourceVersion"]
        self.objects[name]["status"] = body["status"]
        self.written.append(name)
        return self.objects[name]


class View:
    findings: tuple[Finding, ...] = ()
    refused: Mapping[Key, Object] = {}


class Mesh:
    """A controller; without clients, what is published is programmed."""

    def __init__(self) -> None:
        self.server = Server()
        self.programming = Programming()
        registry = CollectorRegistry()
        self.clients = Clients(registry)
        self.keeper = Keeper(View(), self.clients, self.programming)
        self.writer = StatusWriter(
            self.server, self.keeper, "one", lambda *_: False, lambda *_: False, registry
        )

    def publish(self, *names: str, version: str = "", **annotations: str) -> None:
        """These policies are new, or written again; all others are as they were."""
        for name in names:
            self.server.add(name, **annotations)
        objects = {
            key: Object(key, manifest)
            for name, manifest in self.server.objects.items()
            for key in [Key(GROUP, "AuthorizationPolicy", "default", name)]
        }
        self.programming.published(version or str(len(objects)), objects)
        self.keeper.published()


async def test_what_is_new_does_not_wait_for_all_that_a_new_leader_looks_at() -> None:
    mesh = Mesh()
    mesh.publish(*(f"old-{n}" for n in range(200)))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(t) for t in (mesh.keeper.run(), mesh.writer.run())]

        async def begun() -> bool:
            return bool(mesh.server.written)

        await eventually(begun)
        mesh.publish("new")

        async def told() -> bool:
            return "new" in mesh.server.written

        await eventually(told, 30)
        for task in tasks:
            task.cancel()
    assert mesh.server.written.index("new") < 150
    assert len(set(mesh.server.written)) == len(mesh.server.written), "each once"


async def test_an_annotation_is_a_version_too() -> None:
    """Not a generation; so that the status says of this generation that it is programmed means nothing."""
    mesh = Mesh()
    with mesh.clients.connected(Caller("node-1"), "agent", "peer") as client:

        async def programmed(wanted: str) -> None:
            async def said() -> bool:
                conditions = (mesh.server.objects["a"].get("status") or {}).get("conditions") or ()
                return [c["status"] for c in conditions if c["type"] == "Programmed"] == [wanted]

            await eventually(said)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(t) for t in (mesh.keeper.run(), mesh.writer.run())]
            mesh.publish("a", version="v1", **{"istio.io/dry-run": "true"})
            client.answered("v1")
            await programmed("True")
            status = mesh.server.objects["a"]["status"]
            mesh.publish("a", version="v2")
            mesh.server.objects["a"]["status"] = status
            await programmed("False")
            client.answered("v2")
            await programmed("True")
            for task in tasks:
                task.cancel()
