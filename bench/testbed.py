"""Where the rows run: the same pods twice, on nodes that know nothing of a mesh and on Mycel's.

The pods are a client, a server beside it and a server on the other node. Both labs stand for the whole run, so that rounds
can be interleaved. The Envoys live in the pods of the lab without a mesh, as sidecars do: the hop and the pairs' near ends
in the client's, the far ends in the other node's server's. The client dials its Envoy directly, which spares it the
redirection that a sidecar mesh pays for.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench import envoy, loads, nginx, wrk
from bench.rows import Path as Row
from lab.errors import LabError
from lab.lab import Lab
from lab.place import CommandError
from lab.pod import Pod

#: Services of the lab with a mesh, all on port 80 (iperf3 on its own): two with L4 policy, one with routes.
NEAR, FAR, ROUTED = "near", "far", "routed"

_CLIENT = "cluster.local/ns/default/sa/client"


@dataclass(frozen=True, slots=True)
class Pods:
    client: Pod
    near: Pod
    far: Pod


class Testbed:
    """A context manager. ``mesh`` is the lab with Mycel, None when no row needs it; so is ``plain``."""

    def __init__(self, paths: list[Row], *, figures: bool) -> None:
        self._needs_mesh = figures or any(path.mesh for path in paths)
        self._needs_plain = any(not path.mesh for path in paths)
        self._needs_envoy = any(path.name.startswith("envoy") for path in paths)
        self._needs_bulk = any(path.load is loads.Load.BULK for path in paths)
        self._stack = contextlib.ExitStack()
        self._urls: dict[str, tuple[Pod, str]] = {}
        self._services: dict[str, str] = {}
        self.mesh: Lab | None = None
        self.mesh_pods: Pods | None = None
        self.plain: Lab | None = None
        self.plain_pods: Pods | None = None

    def __enter__(self) -> Self:
        try:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mycel-bench-")))
            if self._needs_plain:
                self._build_plain()
            if self._needs_mesh:
                self._build_mesh()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def measure(self, path: Row, *, clients: int, seconds: int) -> wrk.Run:
        """One run of wrk in the client's pod.

        :raises wrk.RunError: it failed, or anything in it did; the message names the path.
        """
        client, url = self._urls[path.name]
        try:
            command = loads.command(path.load, url, clients=clients, seconds=seconds)
            return loads.parse(path.load, client.run(command, timeout=seconds + 30).stdout)
        except (wrk.RunError, LabError) as error:
            raise wrk.RunError(f"{path.name} with {clients} clients: {error}") from error

    def check(self, path: Row, timeout: float = 20.0) -> None:
        """One request on the path has to be answered 200 with the right server's forty bytes.

        :raises wrk.RunError: it was not in ``timeout`` seconds (what has just been configured may need some).
        """
        client, url = self._urls[path.name]
        expected = nginx.body("far" if path.topology == "cross-node" else "near")
        command = ["/usr/bin/curl", "-sS", "--max-time", "3", "-w", " %{http_code}", url]
        deadline = time.monotonic() + timeout
        while True:
            try:
                answered = client.run(command).stdout
            except CommandError as error:
                answered = error.output
            if answered == f"{expected} 200":
                return
            if time.monotonic() > deadline:
                raise wrk.RunError(f"{path.name}: {url} answers {answered!r}, not {expected!r} with 200")
            time.sleep(0.1)

    def service_address(self, name: str) -> str:
        """The cluster address of a service in the lab with a mesh."""
        return self._services[name]

    # -- building

    def _pods(self, lab: Lab, kind: str) -> Pods:
        lab.namespace("default")
        client = lab.pod("client", node="node1", service_account="client")
        near = lab.pod(
            "near", node="node1", service_account="server", labels={"app": "routed", "version": "near"}
        )
        far = lab.pod(
            "far", node="node2", service_account="server", labels={"app": "routed", "version": "far"}
        )
        client.set_ready(True)
        for pod, name in ((near, "near"), (far, "far")):
            folder = self._folder / f"{kind}-{name}"
            folder.mkdir()
            pod.serve(nginx.configure(folder, name), nginx.PORT, nginx.GUARDED)
        if self._needs_bulk:
            near.serve(["iperf3", "--server", "--port", str(loads.BULK_PORT)], loads.BULK_PORT)
        return Pods(client, near, far)

    def _build_plain(self) -> None:
        self.plain = self._stack.enter_context(Lab(nodes=2, mesh=False))
        pods = self.plain_pods = self._pods(self.plain, "plain")
        for name, address, port in (
            ("no-mesh", pods.near.address, nginx.PORT),
            ("no-mesh-new-connections", pods.near.address, nginx.PORT),
            ("no-mesh-bulk", pods.near.address, nginx.PORT),
            ("no-mesh-large-responses", pods.near.address, nginx.PORT),
            ("no-mesh-cross-node", pods.far.address, nginx.PORT),
            ("envoy-http-hop", pods.client.address, envoy.HTTP_HOP),
            ("envoy-mtls-tcp-pair", pods.client.address, envoy.TCP_CLIENT),
            ("envoy-mtls-http-pair", pods.client.address, envoy.HTTP_CLIENT),
        ):
            self._urls[name] = (pods.client, f"http://{address}:{port}/")
        if self._needs_envoy:
            self._start_envoys(pods)

    def _start_envoys(self, pods: Pods) -> None:
        client, server = envoy.make_identities(self._folder)
        near_end = envoy.client_config(
            same_node=pods.near.address,
            other_node=pods.far.address,
            port=nginx.PORT,
            identity=client,
            log=self._folder / "client-access.log",
        )
        far_end = envoy.server_config(
            port=nginx.PORT, identity=server, log=self._folder / "server-access.log"
        )
        for pod, config, ports in (
            (pods.far, far_end, (envoy.TCP_SERVER, envoy.HTTP_SERVER)),
            (pods.client, near_end, (envoy.HTTP_HOP, envoy.TCP_CLIENT, envoy.HTTP_CLIENT)),
        ):
            path = envoy.write(config, self._folder / f"envoy-{pod.record.name}.json")
            pod.serve(envoy.command(path), *ports, timeout=30)

    def _build_mesh(self) -> None:
        lab = self.mesh = self._stack.enter_context(Lab(nodes=2))
        pods = self.mesh_pods = self._pods(lab, "mesh")
        selectors = {
            NEAR: {"app": "routed", "version": "near"},
            FAR: {"app": "routed", "version": "far"},
            ROUTED: {"app": "routed"},
        }
        self._services = {
            name: lab.service(
                name,
                selector=selector,
                ports=[
                    {"name": "http" if name == ROUTED else "tcp", "port": 80, "targetPort": nginx.PORT},
                    {"name": "tcp-bulk", "port": loads.BULK_PORT, "targetPort": loads.BULK_PORT},
                ],
            )
            for name, selector in selectors.items()
        }
        lab.apply([*_BASE, *changing(allowed=True, to="near")], name=CHANGING)
        lab.settle()
        for path, service in (
            ("same-node-l4", NEAR),
            ("same-node-l4-new-connections", NEAR),
            ("same-node-bulk", NEAR),
            ("same-node-large-responses", NEAR),
            ("cross-node-l4", FAR),
            ("same-node-l7", ROUTED),
        ):
            self._urls[path] = (pods.client, f"http://{self._services[service]}/")


#: The file that the policy figure changes.
CHANGING = "bench.yaml"


def changing(*, allowed: bool, to: str) -> list[dict[str, Any]]:
    """The objects whose change is timed: whether the client may dial :data:`nginx.GUARDED`, and where ``routed`` goes."""
    guard = {
        "to": [{"operation": {"ports": [str(nginx.GUARDED)]}}],
        "from": [{"source": {"principals": [_CLIENT]}}],
    }
    return [
        {
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": "guarded", "namespace": "default"},
            "spec": {
                "action": "DENY",
                "selector": {"matchLabels": {"app": "routed"}},
                "rules": [guard if not allowed else {"from": [{"source": {"namespaces": ["elsewhere"]}}]}],
            },
        },
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "VirtualService",
            "metadata": {"name": "routed", "namespace": "default"},
            "spec": {
                "hosts": [ROUTED],
                "http": [{"route": [{"destination": {"host": ROUTED, "subset": to}}]}],
            },
        },
    ]


_BASE: list[dict[str, Any]] = [
    {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "clients", "namespace": "default"},
        "spec": {
            "action": "ALLOW",
            "selector": {"matchLabels": {"app": "routed"}},
            "rules": [{"from": [{"source": {"principals": [_CLIENT]}}]}],
        },
    },
    {
        "apiVersion": "networking.istio.io/v1",
        "kind": "DestinationRule",
        "metadata": {"name": "routed", "namespace": "default"},
        "spec": {
            "host": ROUTED,
            "subsets": [{"name": name, "labels": {"version": name}} for name in ("near", "far")],
        },
    },
]


def base() -> list[dict[str, Any]]:
    """The objects that stay as they are, in the same file as those that change."""
    return list(_BASE)
