"""In which order statuses are written. What is written is test_status.py's, the whole way test_on_kubernetes.py's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry

from common.kubernetes import Client
from controlplane.clients import Clients
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

    def add(self, name: str) -> None:
        metadata = {"name": name, "namespace": "default", "uid": f"uid-{name}", "generation": 1}
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
        self.objects[name]["status"] = body["status"]
        self.written.append(name)
        return self.objects[name]


class View:
    findings: tuple[Finding, ...] = ()
    refused: Mapping[Key, Object] = {}


class Mesh:
    """A controller without clients: what is published is programmed."""

    def __init__(self) -> None:
        self.server = Server()
        self.programming = Programming()
        registry = CollectorRegistry()
        self.keeper = Keeper(View(), Clients(registry), self.programming)
        self.writer = StatusWriter(
            self.server, self.keeper, "one", lambda *_: False, lambda *_: False, registry
        )

    def publish(self, *names: str) -> None:
        for name in names:
            self.server.add(name)
        objects = {
            key: Object(key, manifest)
            for name, manifest in self.server.objects.items()
            for key in [Key(GROUP, "AuthorizationPolicy", "default", name)]
        }
        self.programming.published(str(len(objects)), objects)
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
