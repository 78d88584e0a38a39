"""Controllers as processes against a real API server with the rights of an installation; clients on nodes without kubelets."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import yaml

from controlplane import api
from deploy import manifests
from deploy.values import load
from lab.kubernetes import ControlPlane
from tests.controlplane.cluster import Api
from tests.controlplane.support import MeshClient, eventually
from tests.requirements import ROOT

_RIGHTS = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
_APPLIED = (*_RIGHTS, "Secret", "ConfigMap", "Lease", "Service")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("0.0.0.0", 0))
        return int(s.getsockname()[1])


class Mesh:
    """An installation without its workloads: these are what the test makes of it."""

    def __init__(self, server: ControlPlane, admin: Api, namespace: str, folder: Path) -> None:
        self.server = server
        self.admin = admin
        self.namespace = namespace
        self.folder = folder
        self.replicas: dict[str, Replica] = {}
        # The same for all, as on a cluster; each listens on a loopback address of its own.
        self.port, self.admin_port = _free_port(), _free_port()
        self._number = 0

    def install(self) -> None:
        objects = [o for o in manifests.build(load(), self.namespace) if o["kind"] in _APPLIED]
        self.server.kubectl(
            "apply", "--server-side", "--force-conflicts", "-f", "-", input=yaml.safe_dump_all(objects)
        )

    def uninstall(self) -> None:
        cluster_wide = [
            o
            for o in manifests.build(load(), self.namespace)
            if o["kind"] in ("ClusterRole", "ClusterRoleBinding")
        ]
        self.server.kubectl("delete", "--ignore-not-found", "-f", "-", input=yaml.safe_dump_all(cluster_wide))

    async def start(self, name: str) -> Replica:
        """A controller: its pod, as a kubelet would have made it, and its process."""
        replica = self.replicas.get(name)
        if replica is None:
            self._number += 1
            replica = self.replicas[name] = Replica(self, name, f"127.0.15.{self._number}")
            await replica.make()
        await replica.start()
        return replica

    async def pod(self, name: str, node: str, component: str, address: str = "") -> dict[str, Any]:
        """A pod of ours that runs, as its kubelet says."""
        await self.admin.pod(name, node, f"mycel-{component}", self.namespace)
        status = (
            {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}
            if address
            else {"phase": "Running"}
        )
        path = f"/api/v1/namespaces/{self.namespace}/pods/{name}"
        return await self.admin.client.patch(f"{path}/status", {"status": status})

    async def remove_pods(self) -> None:
        """All but the controllers'."""
        pods = await self.admin.client.list(f"/api/v1/namespaces/{self.namespace}/pods")
        for pod in pods["items"]:
            if pod["metadata"]["name"] not in self.replicas:
                await self.admin.remove_pod(pod["metadata"]["name"], self.namespace)

    async def token(self, name: str, component: str) -> str:
        """A token as kubelet projects it into a pod."""
        pod = await self.admin.client.get(f"/api/v1/namespaces/{self.namespace}/pods/{name}")
        return await self.admin.token(pod, f"mycel-{component}", namespace=self.namespace)

    async def secret(self) -> dict[str, Any]:
        return await self.admin.client.get(f"/api/v1/namespaces/{self.namespace}/secrets/mycel-ca")

    async def roots(self) -> bytes:
        """The public bundle, as agents mount it."""
        path = f"/api/v1/namespaces/{self.namespace}/configmaps/mycel-roots"

        async def there() -> bool:
            return bool((await self.admin.client.get(path)).get("data"))

        await eventually(there, 20)
        return str((await self.admin.client.get(path))["data"]["roots.pem"]).encode()

    async def lease_holder(self) -> str:
        path = f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases/mycel-controlplane"
        return str(((await self.admin.client.get(path)).get("spec") or {}).get("holderIdentity") or "")

    async def close(self) -> None:
        for replica in self.replicas.values():
            await replica.kill()
        self.uninstall()


class Replica:
    """One controller, listening on a loopback address of its own."""

    def __init__(self, mesh: Mesh, name: str, address: str) -> None:
        self.mesh = mesh
        self.name = name
        self.address = address
        self.folder = mesh.folder / name
        self.process: asyncio.subprocess.Process | None = None

    async def make(self) -> None:
        self.folder.mkdir(parents=True)
        await self.mesh.pod(self.name, "node-controllers", "controlplane", self.address)
        (self.folder / "token").write_text(await self.mesh.token(self.name, "controlplane"))
        pod = await self.mesh.admin.client.get(f"/api/v1/namespaces/{self.mesh.namespace}/pods/{self.name}")
        api_token = await self.mesh.admin.token(pod, "mycel-controlplane", "", self.mesh.namespace)
        config = yaml.safe_load(self.mesh.server.kubeconfig.read_text())
        config["users"] = [{"name": u["name"], "user": {"token": api_token}} for u in config["users"]]
        (self.folder / "kubeconfig").write_text(yaml.safe_dump(config))

    async def start(self) -> None:
        """Start the process; it need not be ready when this returns."""
        command = [
            sys.executable,
            "-m",
            "controlplane",
            "--kubernetes",
            "--log-format=json",
            "--log-level=debug",
        ]
        command += [f"--kubeconfig={self.folder}/kubeconfig", f"--namespace={self.mesh.namespace}"]
        command += [f"--state={self.folder}/state", f"--listen={self.address}:{self.mesh.port}"]
        command += [
            f"--admin={self.address}:{self.mesh.admin_port}",
            f"--credential={self.folder}/token",
            f"--replica={self.name}",
        ]
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=log, stdout=log)
        os.close(log)

    async def ready(self, timeout: float = 90.0) -> None:
        async def answers() -> bool:
            assert self.process is not None
            assert self.process.returncode is None, self.log()[-3000:]
            return await self.fetch("/healthz/ready") is not None

        await eventually(answers, timeout)

    async def kill(self) -> None:
        await self.end(signal.SIGKILL)

    async def end(self, number: int = signal.SIGTERM) -> int:
        if self.process is None or self.process.returncode is not None:
            return 0
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), 15)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    async def fetch(self, path: str) -> bytes | None:
        """A page of the admin server; None if there is none (yet)."""

        def get() -> bytes | None:
            try:
                with urllib.request.urlopen(
                    f"http://{self.address}:{self.mesh.admin_port}{path}", timeout=5
                ) as answer:
                    return bytes(answer.read())
            except OSError:
                return None

        return await asyncio.to_thread(get)

    async def page(self, path: str) -> Any:
        body = await self.fetch(path)
        assert body is not None, path
        return json.loads(body)

    async def metric(self, name: str) -> float:
        """A metric's value; of one with labels the sum."""
        text = (await self.fetch("/metrics") or b"").decode()
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith((f"{name} ", f"{name}{{"))
        )

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        """A connection as clients make it: the Service's name is what they verify."""
        async with grpc.aio.secure_channel(
            f"{self.address}:{self.mesh.port}",
            grpc.ssl_channel_credentials(await self.mesh.roots()),
            options=[("grpc.ssl_target_name_override", f"mycel-controlplane.{self.mesh.namespace}.svc")],
        ) as channel:
            yield channel

    @asynccontextmanager
    async def client(
        self, token: str, component: str = "agent", version: str = ""
    ) -> AsyncIterator[MeshClient]:
        """A stream that has said Hello."""
        async with self.channel() as channel:
            client = MeshClient(channel, metadata=bearer(token))
            await client.hello(component, version)
            yield client


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


class Follower:
    """Takes and acknowledges whatever a client is sent, unless it is held."""

    def __init__(self, client: MeshClient) -> None:
        self.client = client
        self.go = asyncio.Event()
        self.go.set()
        self.task = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            update = await self.client.receive(timeout=600)
            await self.go.wait()
            if update.complete:
                self.client.state = {}
            for key in update.removes:
                del self.client.state[key]
            self.client.state |= {api.resource_key(r): r for r in update.upserts}
            self.client.version = update.version
            await self.client.ack(update)

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})
