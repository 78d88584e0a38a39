"""``make demo-kubernetes``: Mycel on a real cluster, as a platform team would bring it in, each claim checked on real traffic.

Owns the story; what runs on the cluster is installed and configured with ``mycel`` and ``kubectl`` alone.
"""

from __future__ import annotations

import collections
import json
import secrets
import sys
import time
from collections.abc import Callable
from typing import Any

from lab.capture import Capture
from lab.demo import CANARY, DENY, REQUESTS, SIGMAS, STRICT, Story, Untrue, require
from lab.errors import LabError
from lab.kubernetes.cluster import Cluster
from lab.kubernetes.mesh import Mesh, archives
from lab.kubernetes.pod import PodPlace
from lab.processes import wait_until
from lab.talker import Talker

IMAGE = "mycel.io/lab/apps:1"
HTTP, ECHO = 8080, 9000
LABEL = "mycel.io/mesh=enabled"


class Demo:
    """``web-app`` v1 and v2 and a ledger, a client on each node, and a stranger in a namespace outside of the mesh."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.mesh = Mesh(cluster)
        web = ["python3", "/apps/http_server.py", str(HTTP), "--version"]
        echo = ["python3", "/apps/tcp_server.py", str(ECHO)]
        cluster.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "outside"}},
            *deployment("web-app-v1", "node1", [*web, "v1"], app="web-app", port=HTTP, version="v1"),
            *deployment("web-app-v2", "node2", [*web, "v2"], app="web-app", port=HTTP, version="v2"),
            *deployment("ledger", "node1", echo, port=ECHO),
            *deployment("client", "node1"),
            *deployment("teller", "node2"),
            *deployment("stranger", "node2", namespace="outside"),
            *deployment("plain-server", "node1", echo, port=ECHO, namespace="outside"),
            service("web-app", 80, HTTP, "http"),
            service("ledger", 7000, ECHO, "tcp"),
        )
        for namespace in ("default", "outside"):
            cluster.kubectl(
                *(
                    "wait",
                    "--for=condition=Available",
                    "deployment",
                    "--all",
                    "-n",
                    namespace,
                    "--timeout=120s",
                ),
                timeout=130,
            )
        self.client, self.teller = self.pod("client"), self.pod("teller")
        self.stranger = self.pod("stranger", "outside")

    def pod(self, name: str, namespace: str = "default") -> PodPlace:
        return PodPlace(self.cluster, namespace, self._pod(name, namespace)["metadata"]["name"])

    def address(self, name: str, namespace: str = "default") -> str:
        return str(self._pod(name, namespace)["status"]["podIP"])

    def _pod(self, name: str, namespace: str) -> dict[str, Any]:
        pod: dict[str, Any] = self.cluster.get("pods", "-n", namespace, "-l", f"deployment={name}")["items"][
            0
        ]
        return pod

    def capture(self) -> Capture:
        """What is on the wire between the nodes."""
        return Capture(self.cluster.network, [f"fabric{node.number}" for node in self.cluster.nodes])

    def fetch(self, client: PodPlace, count: int, **values: object) -> list[dict[str, Any]]:
        options = [
            part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))
        ]
        done = client.run(
            client.app("http_client", "http://web-app/", "--count", count, *options), timeout=90
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    def echoes(self, client: PodPlace, host: str = "ledger", port: int = 7000, timeout: float = 3.0) -> bool:
        with Talker(client) as talker:
            return talker.open(host, port, timeout=timeout).ok and talker.exchange(timeout=timeout).ok

    # -- the claims

    def install(self) -> str:
        self.mesh.mycel("check", "--pre")
        seconds = self.mesh.install(crds=("istio",))
        began = time.monotonic()
        self.mesh.mycel("check", "--wait", "60s")
        seconds += time.monotonic() - began
        return f"mycel install | kubectl apply, until mycel check passed: {seconds:.1f} s (bar: 30 s)"

    def enrol(self) -> str:
        before = self._lives()
        marker = secrets.token_hex(16)
        require(
            not self._is_sealed(marker), "the capture sees no plain text without a mesh: it proves nothing"
        )
        with Talker(self.teller) as talker:
            require(talker.open("ledger", 7000).ok and talker.exchange().ok, "the ledger is not there")
            self.cluster.kubectl("label", "namespace", "default", LABEL)
            began = time.monotonic()
            eventually(
                lambda: self._is_sealed(marker), 30.0, "new connections between the nodes stay in plain text"
            )
            seconds = time.monotonic() - began
            require(talker.exchange().ok, "a connection from before did not live through it")
        require(self._lives() == before, "a pod was started again")
        return f"{len(before)} running pods joined within {seconds:.1f} s; none restarted, an open connection went on"

    def _lives(self) -> dict[str, int]:
        pods = self.cluster.get("pods", "-n", "default")["items"]
        return {
            pod["metadata"]["uid"]: sum(
                status["restartCount"] for status in pod["status"]["containerStatuses"]
            )
            for pod in pods
        }

    def _is_sealed(self, marker: str) -> bool:
        with self.capture() as capture:
            self._send(self.teller, "ledger", 7000, marker)
        return capture.holds(marker.encode()) == 0

    def _send(self, client: PodPlace, host: str, port: int, marker: str) -> None:
        with Talker(client) as talker:
            opened = talker.open(host, port)
            require(opened.ok, f"the connection failed: {opened.error}")
            for _ in range(20):
                talker("send", text=marker * 10)
                received = 0
                while received < len(marker) * 10:
                    answer = talker("read")
                    require(answer.ok and answer["text"], f"the connection ended: {answer.values}")
                    received += len(answer["text"])

    def canary(self) -> str:
        self.cluster.apply(CANARY)
        # One in five rather than the one in two of a Service: the route is in force.
        eventually(lambda: self._share(60) < 0.4, 20.0, "requests are still split by halves")
        answers = self.fetch(self.client, REQUESTS, per_connection=100)
        bad = [answer for answer in answers if answer.get("status") != 200]
        require(not bad, f"{len(bad)} of {REQUESTS} requests failed, the first: {bad[:1]}")
        counted = collections.Counter(answer["body"]["version"] for answer in answers)
        bound = SIGMAS * (REQUESTS * 0.8 * 0.2) ** 0.5
        seen = f"v1 {counted['v1']}, v2 {counted['v2']} of {REQUESTS} (bounds: v2 {200 - bound:.0f} to {200 + bound:.0f})"
        require(abs(counted["v2"] - REQUESTS * 0.2) <= bound and counted.total() == REQUESTS, seen)
        clients = {answer["body"]["client"] for answer in answers}
        require(clients == {self.address("client")}, f"servers saw {clients}, not the client's own address")
        return seen

    def _share(self, count: int) -> float:
        answers = self.fetch(self.client, count)
        found = [answer.get("body", {}).get("version") for answer in answers]
        return found.count("v2") / max(len(found), 1)

    def encrypted(self) -> str:
        marker = secrets.token_hex(16)
        with self.capture() as capture:
            self._send(self.teller, "ledger", 7000, marker)
            answers = self.fetch(self.client, 50, header=f"x-marker: {marker}")
        bad = [answer for answer in answers if answer.get("status") != 200]
        require(not bad, f"{len(bad)} of {len(answers)} requests failed, the first: {bad[:1]}")
        versions = {answer["body"]["version"] for answer in answers}
        require(versions == {"v1", "v2"}, f"requests went to {versions} only")
        found = capture.holds(marker.encode())
        require(found == 0, f"{found} packets between the nodes hold the payload in plain text")
        sealed = len(capture.packets())
        with self.capture() as capture:
            self._send(self.stranger, self.address("plain-server", "outside"), ECHO, marker)
        plain = capture.holds(marker.encode())
        require(plain > 0, "the same capture does not find the payload without the mesh: it proves nothing")
        return f"0 of {sealed} packets hold the payload; outside of the mesh, {plain} of {len(capture.packets())} do"

    def strict(self) -> str:
        ledger = self.address("ledger")

        def reaches() -> bool:
            return self.echoes(self.stranger, ledger, ECHO, timeout=2.0)

        require(reaches(), "the stranger was refused before, under PERMISSIVE")
        self.cluster.apply(STRICT)
        eventually(lambda: not reaches(), 10.0, "the stranger still gets through")
        require(self.echoes(self.teller), "a client of the mesh is refused")
        time.sleep(
            6.0
        )  # a pod is not ready after three probes that fail, a second apart; and kubelet tells of it
        pods = self.cluster.get("pods", "-n", "default", "-l", "app")["items"]
        unready = [
            pod["metadata"]["name"]
            for pod in pods
            if not all(status["ready"] for status in pod["status"]["containerStatuses"])
        ]
        require(not unready, f"kubelet's probes are refused: {unready} are not ready")
        return "plain TCP from outside of the mesh passed before and is refused now; clients and probes pass"

    def denied(self) -> str:
        policy = DENY.format(name="teller", app="ledger", account="teller")
        with Talker(self.teller) as talker:
            require(talker.open("ledger", 7000).ok and talker.exchange().ok, "the client cannot connect")
            began = time.monotonic()
            self.cluster.apply(policy)
            while talker.exchange(timeout=3).ok:
                require(time.monotonic() < began + 10, "the established connection goes on 10 s later")
            seconds = time.monotonic() - began
        require(not self.echoes(self.teller), "a new connection gets through")
        require(self.echoes(self.client), "another client is refused too")
        status = self.cluster.get("authorizationpolicies.security.istio.io", "teller", "-n", "default").get(
            "status", {}
        )
        self.cluster.kubectl("delete", "authorizationpolicies.security.istio.io", "teller", "-n", "default")
        eventually(
            lambda: self.echoes(self.teller), 10.0, "the client is still refused when the policy is gone"
        )
        said = ", ".join(f"{c['type']}={c['status']}" for c in status.get("conditions", ()))
        return f"its established connection ended {seconds * 1000:.0f} ms after kubectl apply began; .status: {said or 'none'}"

    def check(self) -> str:
        return indented("mycel check", self.mesh.mycel("check"))

    def figures(self) -> str:
        with self.client.popen(
            self.client.app("http_client", "http://web-app/", "--count", 600, "--interval", 0.01)
        ) as traffic:
            seen = self.mesh.mycel("stat", "--interval", 3)
            traffic.communicate()
        require("web-app" in seen, f"mycel stat does not know web-app: {seen}")
        return indented("mycel stat", seen)


def deployment(
    name: str,
    node: str,
    command: list[str] | None = None,
    *,
    app: str = "",
    port: int = 0,
    version: str = "v1",
    namespace: str = "default",
) -> list[dict[str, Any]]:
    """A Deployment on one node and its service account; a client that sleeps, without a command."""
    labels = {"app": app or name, "version": version, "deployment": name}
    container: dict[str, Any] = {"name": "main", "image": IMAGE}
    if command:
        container["command"] = command
    if port:
        container["readinessProbe"] = {"tcpSocket": {"port": port}, "periodSeconds": 1}
    spec = {
        "serviceAccountName": app or name,
        "terminationGracePeriodSeconds": 1,
        "nodeSelector": {"kubernetes.io/hostname": node},
        "containers": [container],
    }
    metadata = {"name": name, "namespace": namespace}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {**metadata, "name": app or name}},
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                "selector": {"matchLabels": {"deployment": name}},
                "template": {"metadata": {"labels": labels}, "spec": spec},
            },
        },
    ]


def service(name: str, port: int, target: int, protocol: str) -> dict[str, Any]:
    spec = {"selector": {"app": name}, "ports": [{"name": protocol, "port": port, "targetPort": target}]}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": spec,
    }


def eventually(condition: Callable[[], bool], timeout: float, otherwise: str) -> None:
    """:raises Untrue: the condition does not hold within ``timeout`` seconds."""
    try:
        wait_until(condition, timeout, otherwise, interval=0.1)
    except LabError as error:
        raise Untrue(otherwise) from error


def indented(title: str, text: str) -> str:
    return f"{title} says:\n" + "\n".join(f"         {line}" for line in text.rstrip().splitlines())


def tell(demo: Demo) -> int:
    """The whole story; the process' exit status: 0 only if every claim held."""
    told = Story()
    told.chapter("one command installs it, and mycel check passes", demo.install)
    told.chapter("a label brings running pods in, without a restart", demo.enrol)
    told.chapter("a canary of 80/20, as kubectl applied it, is split by request", demo.canary)
    told.chapter("between the nodes there is mutual TLS and no plain byte", demo.encrypted)
    told.chapter("under STRICT a stranger is refused, and kubelet's probes are not", demo.strict)
    told.chapter("an AuthorizationPolicy denies a client, established connections too", demo.denied)
    told.chapter("mycel check finds no error", demo.check)
    told.chapter("mycel stat shows what it does", demo.figures)
    return told.summary()


def main() -> int:
    print("Mycel on Kubernetes: a real API server and two nodes on this machine.\n", flush=True)
    try:
        images = archives()
        with Cluster(f"demo{secrets.token_hex(2)}") as cluster:
            print(f"cluster of two nodes in {cluster.start_seconds:.1f} s", flush=True)
            began = time.monotonic()
            cluster.load(*images)
            print(f"images loaded in {time.monotonic() - began:.1f} s", flush=True)
            demo = Demo(cluster)
            print("applications run, without a mesh\n", flush=True)
            return tell(demo)
    except LabError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
