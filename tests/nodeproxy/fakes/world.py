"""Two node proxies in this process, each with its loop's thread, its fake agent, and pods on addresses of 127/8."""

import functools
import hashlib
import itertools
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from agent.api import Enroll
from controlplane.api import (
    Authorization,
    MeshConfig,
    NetworkPolicy,
    Resource,
    Service,
    SignRequest,
    SignResponse,
    Update,
    Workload,
)
from nodeproxy.agent_client import AgentClient
from nodeproxy.loop import Loop
from nodeproxy.node import NodeProxy
from tests.nodeproxy.fakes.agent import Agent, CapturedTable
from tests.nodeproxy.fakes.authority import Authority

_subnets = itertools.count(10)


def identity(name: str, domain: str = "cluster.local") -> str:
    return f"spiffe://{domain}/ns/default/sa/{name}"


def wait_until(condition: Callable[[], object], what: str, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.005)


class Node:
    """One node: a proxy that runs, and what it is told."""

    def __init__(self, world: "World", name: str, folder: Path, envoy: Path | None = None) -> None:
        self.world = world
        self.name = name
        self.run = folder / name
        (self.run / "nodeproxy").mkdir(parents=True)
        self.agent = Agent(self.run / "agent.sock", name)
        self.captured = CapturedTable()
        self.loop = Loop()
        self.requests: list[SignRequest] = []
        self.sign: Callable[[SignRequest], SignResponse | str] = self._sign
        self.proxy = NodeProxy(self.loop, node=name, run=self.run, sign=self._on_sign, envoy=envoy)
        self.client: AgentClient = self.proxy.agent
        self.client.captured = self.captured  # type: ignore[assignment]
        self.proxy.start()
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()
        wait_until((self.run / "nodeproxy/nodeproxy.sock").exists, f"{name} serves")

    def _on_sign(self, request: SignRequest, done: Callable[[SignResponse | str], None]) -> None:
        self.requests.append(request)
        answer = self.sign(request)
        self.loop.post(lambda: done(answer))

    def _sign(self, request: SignRequest) -> SignResponse | str:
        workload = self.world.workloads[request.uid]
        return self.world.authority.answer(request, workload.identity)

    def call(self, function: Callable[[], object]) -> object:
        """Run on the loop's thread and wait for the result."""
        done = threading.Event()
        result: list[object] = []

        def run() -> None:
            try:
                result.append(function())
            finally:
                done.set()

        self.loop.post(run)
        assert done.wait(5), "the loop does not answer"
        return result[0]

    def stop(self) -> None:
        self.loop.stop()
        self._thread.join(5)
        assert not self._thread.is_alive(), "the loop does not stop"
        self.proxy.handoffs.stop()
        self.agent.stop()
        self.loop.turn(0)
        for pod in self.client.pods.values():
            for listener in pod.listeners.values():
                listener.close()
        for link in (*self.proxy.pool.links(), *self.proxy.inbound.links()):
            link.close("test ends")
        for stock in self.client._stocks.values():
            for sock in stock.ready:
                sock.close()
        if self.client._socket is not None:
            self.client._socket.close()
        self.loop.shutdown()


class World:
    """The mesh: nodes ``a`` and ``b``; workload ``client`` on a, ``server`` on b."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mycel-np-")
        folder = Path(self._folder.name)
        subnet = f"127.{next(_subnets)}.{int(hashlib.sha256(folder.name.encode()).hexdigest()[:2], 16)}"
        self.authority = Authority()
        self.workloads: dict[str, Workload] = {}
        self.policies: dict[str, Authorization] = {}
        self.network_policies: list[NetworkPolicy] = []
        self.services: list[Service] = []
        self.trust_domain = "cluster.local"
        self.roots = self.authority.pem
        self.client_address = f"{subnet}.1"
        self.server_address = f"{subnet}.2"
        self.a = Node(self, "a", folder)
        self.b = Node(self, "b", folder)
        self.nodes = [self.a, self.b]
        self._nonce = 0
        self.client = self.pod(self.a, "client", self.client_address, 1)
        self.server = self.pod(self.b, "server", self.server_address, 2)
        self.publish()

    def pod(self, node: Node, name: str, address: str, cookie: int, *, enroll: bool = True) -> Workload:
        workload = Workload(
            f"uid-{name}", "default", name, name, node.name, identity(name), (address,), True, True,
            workload_name=name, app=name, version="v1",
        )  # fmt: skip
        self.workloads[workload.uid] = workload
        if enroll:
            self.enroll(node, workload, cookie)
        return workload

    def enroll(self, node: Node, workload: Workload, cookie: int) -> None:
        w = workload
        description = (w.namespace, w.name, w.service_account, w.identity, w.workload_name, w.app, w.version)
        node.agent.enroll(Enroll(w.uid, cookie, w.addresses[0], *description))

    def update(self) -> Update:
        self._nonce += 1
        resources: tuple[Resource, ...] = (
            MeshConfig(self.trust_domain, self.roots),
            *self.workloads.values(),
            *self.policies.values(),
            *self.network_policies,
            *self.services,
        )
        return Update(self._nonce, f"v{self._nonce}", complete=True, upserts=resources)

    def publish(self, *nodes: Node) -> None:
        """Put the present state in force on the nodes (all)."""
        update = self.update()
        for node in nodes or self.nodes:
            errors = node.call(functools.partial(node.proxy.update, update))
            assert errors == (), errors

    def ready(self) -> None:
        """Both pods have their certificates."""
        for node, pod in ((self.a, self.client), (self.b, self.server)):
            get = functools.partial(node.proxy.certificates.get, pod.uid)
            wait_until(functools.partial(node.call, get), f"certificate of {pod.name}")

    def dial(self, port: int, timeout: float = 10.0) -> socket.socket:
        """As the client's application does, when the kernel turned its connect() to the listener on node a."""
        sock = socket.socket()
        sock.settimeout(timeout)
        # The node proxies' sockets are in this same namespace: let the delivery have the client's port too.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self.client_address, 0))
        self.a.captured.destinations[sock.getsockname()] = (self.server_address, port)
        sock.connect((self.client_address, 15001))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def close(self) -> None:
        for node in self.nodes:
            node.stop()
        self._folder.cleanup()
