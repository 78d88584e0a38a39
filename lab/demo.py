"""``make demo``: the whole mesh on two nodes, one story, each claim checked on real traffic.

Owns the story and its verdicts, nothing else: what it does is what a user would do, with files of the kind a user has. Exit
status 0 only if every claim held.
"""

from __future__ import annotations

import collections
import json
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lab.cluster import ipv6_of
from lab.errors import LabError
from lab.lab import Lab
from lab.pod import Pod
from lab.processes import wait_until
from lab.talker import Talker
from lab.traffic import Traffic

HTTP = 8080
ECHO = 9000
DATAGRAMS = 5353
#: A split of 80/20 over this many requests; chance leaves five standard deviations once in two million runs.
REQUESTS = 1000
SIGMAS = 5

CANARY = """\
apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata:
  name: web-dr
spec:
  host: web-app
  subsets:
  - name: v1
    labels:
      version: v1
  - name: v2
    labels:
      version: v2
---
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata:
  name: web-vs
spec:
  hosts:
  - web-app
  http:
  - route:
    - destination:
        host: web-app
        subset: v1
      weight: 80
    - destination:
        host: web-app
        subset: v2
      weight: 20
"""

STRICT = """\
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata:
  name: default
  namespace: default
spec:
  mtls:
    mode: STRICT
"""

DENY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: {name}
  namespace: default
spec:
  action: DENY
  selector:
    matchLabels:
      app: {app}
  rules:
  - from:
    - source:
        principals: ["cluster.local/ns/default/sa/{account}"]
"""

ONLY_TELLER = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: only-teller
  namespace: default
spec:
  podSelector:
    matchLabels:
      app: ledger
  ingress:
  - from:
    - podSelector:
        matchLabels:
          app: teller
    ports:
    - port: 9000
"""


class Story:
    """Runs the chapters, prints what is claimed and what was seen, and remembers."""

    def __init__(self) -> None:
        self._results: list[tuple[bool, str, str]] = []
        self._began = time.monotonic()

    def chapter(self, claim: str, check: Callable[[], str]) -> None:
        """``check`` returns what was seen, or raises :class:`Untrue` (or a lab's error)."""
        started = time.monotonic()
        try:
            seen, held = check(), True
        except (Untrue, LabError) as error:
            seen, held = str(error), False
        self._results.append((held, claim, seen))
        mark = "ok    " if held else "FAILED"
        print(f"{mark} {claim}\n       {seen}  ({time.monotonic() - started:.1f} s)", flush=True)

    def summary(self) -> int:
        """Print what held and what did not; the process' exit status."""
        held = sum(result[0] for result in self._results)
        print("\nSummary")
        for good, claim, _ in self._results:
            print(f"  {'ok    ' if good else 'FAILED'} {claim}")
        print(f"{held} of {len(self._results)} claims held, in {time.monotonic() - self._began:.0f} s.")
        return 0 if held == len(self._results) else 1


class Untrue(Exception):
    """A claim did not hold; the text says what was seen instead."""


def require(condition: object, seen: str) -> None:
    if not condition:
        raise Untrue(seen)


class Demo:
    """The cast: ``web-app`` v1 and v2, a ledger, a client on each node, and a stranger without the mesh."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        lab.namespace("default")
        lab.namespace("outside", mesh=False)
        self.web = lab.service("web-app", 80, target_port=HTTP)
        self.ledger = lab.service(
            "ledger",
            ports=[
                {"name": "tcp", "port": 7000, "targetPort": ECHO, "protocol": "TCP"},
                {"name": "udp", "port": 7000, "targetPort": DATAGRAMS, "protocol": "UDP"},
            ],
        )
        for version, node in (("v1", "node1"), ("v2", "node2")):
            pod = lab.pod(
                f"web-app-{version}",
                node=node,
                service_account="web-app",
                labels={"app": "web-app", "version": version},
            )
            pod.serve(pod.app("http_server", HTTP, "--version", version), HTTP)
            #: v2, on the other node than the client.
            self.web_far = pod
        self.ledger_pod = pod = self._echo("ledger", "--bind", "::", "--poll", node="node1")
        pod.serve(pod.app("udp", "serve", "0.0.0.0", DATAGRAMS, " there"))
        wait_until(partial(pod.listening, DATAGRAMS, kind="udp"), 5.0, "the ledger answers datagrams")
        self.client = lab.pod("client", node="node1", service_account="client")
        self.far = lab.pod("teller", node="node2", service_account="teller")
        self.stranger = lab.pod("stranger", node="node2", namespace="outside")
        self.plain_server = self._echo("plain-server", node="node1", namespace="outside")
        lab.settle()

    def _echo(self, name: str, *options: str, **values: Any) -> Pod:
        pod = self.lab.pod(name, service_account=name, **values)
        pod.serve(pod.app("tcp_server", ECHO, *options), ECHO)
        return pod

    def fetch(self, client: Pod, count: int, **values: object) -> list[dict[str, Any]]:
        """Answers of ``web-app``; ``values`` are options of the client's (``lab/apps/http_client.py``)."""
        options = [
            part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))
        ]
        done = client.run(
            client.app("http_client", f"http://{self.web}/", "--count", count, *options), timeout=60
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    # -- the claims

    def canary(self) -> str:
        self.lab.apply(CANARY, name="canary.yaml")
        self.lab.settle()
        answers = self.fetch(self.client, REQUESTS, per_connection=100)
        bad = [answer for answer in answers if answer.get("status") != 200]
        require(not bad, f"{len(bad)} of {REQUESTS} requests failed, the first: {bad[:1]}")
        counted = collections.Counter(answer["body"]["version"] for answer in answers)
        bound = SIGMAS * (REQUESTS * 0.8 * 0.2) ** 0.5
        seen = f"v1 {counted['v1']}, v2 {counted['v2']} of {REQUESTS} (bounds: v2 {200 - bound:.0f} to {200 + bound:.0f})"
        require(abs(counted["v2"] - REQUESTS * 0.2) <= bound and counted.total() == REQUESTS, seen)
        clients = {answer["body"]["client"] for answer in answers}
        require(clients == {self.client.address}, f"servers saw {clients}, not the client's own address")
        return seen

    def _send(self, client: Pod, address: str, port: int, marker: str) -> None:
        with Talker(client) as talker:
            opened = talker.open(address, port)
            require(opened.ok, f"the connection failed: {opened.error}")
            for _ in range(20):
                talker("send", text=marker * 10)
                received = 0
                while received < len(marker) * 10:
                    answer = talker("read")
                    require(answer.ok and answer["text"], f"the connection ended: {answer.values}")
                    received += len(answer["text"])

    def encrypted(self) -> str:
        marker = secrets.token_hex(16)
        with self.lab.capture() as capture:
            self._send(self.far, self.ledger, 7000, marker)
            answers = self.fetch(self.client, 50, header=f"x-marker: {marker}")
        versions = {answer["body"]["version"] for answer in answers}
        require(versions == {"v1", "v2"}, f"requests went to {versions} only")
        require(
            all(answer["body"]["headers"]["x-marker"] == marker for answer in answers),
            "a server did not get the marker",
        )
        found = capture.holds(marker.encode())
        require(found == 0, f"{found} packets between the nodes hold the payload in plain text")
        senders = {self.far.address: self.ledger_pod.address, self.client.address: self.web_far.address}
        ports = {
            port
            for source, _, destination, port, payload in capture.segments()
            if payload and senders.get(source) == destination
        }
        require(ports == {15008}, f"payload went to ports {ports}, not to 15008 alone")
        sealed = len(capture.packets())
        with self.lab.capture() as capture:
            self._send(self.stranger, self.plain_server.address, ECHO, marker)
        plain = capture.holds(marker.encode())
        require(plain > 0, "the same capture does not find the payload without the mesh: it proves nothing")
        return f"0 of {sealed} packets hold the payload; without the mesh, {plain} of {len(capture.packets())} do"

    def strict(self) -> str:
        def reaches() -> bool:
            with Talker(self.stranger) as talker:
                opened = talker.open(self.ledger_pod.address, ECHO, timeout=2)
                return opened.ok and talker.exchange(timeout=2).ok

        require(reaches(), "the stranger was refused before, under PERMISSIVE")
        self.lab.apply(STRICT, name="strict.yaml")
        self.lab.settle()
        require(not reaches(), "the stranger still gets through")
        require(self.lab.probe(self.ledger_pod, ECHO), "the kubelet's probe is refused")
        require(self._echoes(self.far), "a client of the mesh is refused")
        return "plain TCP from outside the mesh passed before and is refused now; clients and probes pass"

    def _echoes(self, client: Pod, timeout: float = 5.0) -> bool:
        with Talker(client) as talker:
            return talker.open(self.ledger, 7000, timeout=timeout).ok and talker.exchange(timeout=timeout).ok

    def policy_change(self) -> str:
        times: list[float] = []
        for _ in range(5):
            with Talker(self.far) as talker:
                require(talker.open(self.ledger, 7000).ok, "the client cannot connect")
                require(talker.exchange().ok, "the client gets no answer")
                began = time.monotonic()
                file = self.lab.apply(
                    DENY.format(name="teller", app="ledger", account="teller"), name="deny.yaml"
                )
                while talker.exchange(timeout=3).ok:
                    require(time.monotonic() < began + 5, "the established connection goes on 5 s later")
                times.append(time.monotonic() - began)
                require(not self._echoes(self.far, timeout=2), "a new connection gets through")
            self.lab.withdraw(file)
            self.lab.settle()
            require(self._echoes(self.far), "the client is still refused when the policy is gone")
        seen = f"established connections ended after {_milliseconds(times)} (bar: 1000 ms), new ones were refused"
        require(max(times) <= 1.0, seen)
        return seen

    def denied_in_the_kernel(self) -> str:
        before = self._refused()
        with Talker(self.client) as talker:
            require(talker.open(self.ledger, 7000).ok and talker.exchange().ok, "the client cannot connect")
            file = self.lab.apply(
                DENY.format(name="client", app="ledger", account="client"), name="deny.yaml"
            )
            self.lab.settle()
            require(not talker.exchange(timeout=2).ok, "the established connection goes on")
            refused = talker.open(self.ledger, 7000, "again", timeout=1)
            require(not refused.ok, "connect() succeeded: it was not the kernel that refused")
        after = self._refused()
        self.lab.withdraw(file)
        self.lab.settle()
        require(after > before, "the kernel has not counted a refusal")
        return f"connect() itself fails ({refused.error}); the kernel counted {after - before:.0f} refusals"

    def _refused(self) -> float:
        return sum(
            sample.value
            for sample in self.lab.metrics("node1", "agent").samples("mycel_tcp_connections_refused_total")
            if sample.labels.get("source_workload") == "client"
        )

    def ipv6(self) -> str:
        address = ipv6_of(self.ledger)
        for client in (self.client, self.far):
            with Talker(client) as talker:
                opened = talker.open(address, 7000)
                require(opened.ok, f"the connection failed: {opened.error}")
                ends = (opened["local"][0], opened["peer"])
                require(ends == (client.address6, [address, 7000]), f"the client sees {ends}")
                require(talker.exchange().ok, "the client gets no answer")
        with Talker(self.stranger) as talker:
            opened = talker.open(self.ledger_pod.address6, ECHO, timeout=2)
            require(not (opened.ok and talker.exchange(timeout=2).ok), "the stranger gets through")
        return f"[{address}]:7000 answers both clients, at their own addresses; the stranger is refused"

    def _asks(self, client: Pod) -> str:
        """What a datagram to the ledger is answered with, or the error."""
        done = client.run(client.app("udp", "ask", self.ledger, 7000, "anybody?"), check=False, timeout=15)
        return done.stdout.strip().rpartition("\n")[2]

    def datagrams(self) -> str:
        answers = [self._asks(client) for client in (self.client, self.far)]
        require(answers == ["anybody? there"] * 2, f"the clients got {answers}")
        denied = DENY.format(name="client", app="ledger", account="client")
        with self.lab.applied(denied, name="deny.yaml"):
            refused, allowed = self._asks(self.client), self._asks(self.far)
        require(refused.startswith("PermissionError"), f"who is denied got {refused}")
        require(allowed == answers[0], f"who is not denied got {allowed}")
        return f"the service answers clients of both nodes; who is denied gets {refused}"

    def network_policy(self) -> str:
        with self.lab.applied(ONLY_TELLER, name="only-teller.yaml"):
            near, far = self._echoes(self.client, timeout=1), self._echoes(self.far)
        require(far, "whom the policy names is refused")
        require(not near, "whom it does not name gets through")
        require(self._echoes(self.client), "the client is still refused when the policy is gone")
        return "teller, on the other node, gets through; client, beside the ledger, does not"

    def why(self) -> str:
        said: list[str] = []
        with self.lab.applied(ONLY_TELLER, name="only-teller.yaml"):
            for client in (self.client, self.far):
                name = f"{client.record.namespace}/{client.record.name}"
                done = self.lab.mycel("why", name, "ledger.default:7000", check=False)
                happens = self._echoes(client, timeout=2)
                require(done.returncode == (0 if happens else 1), f"not what happens: {done.stdout}")
                said += [f"{name}: {done.stdout.rstrip().splitlines()[-1]}"]
        require("default/only-teller" in said[0], f"the policy that refuses is not named: {said[0]}")
        return "mycel why says of the ledger:\n" + "\n".join(f"         {line}" for line in said)

    def _account(self) -> tuple[int, int]:
        """What the kernel says that the client's applications have sent to the ledger and read of it."""
        rows = [
            row
            for row in self.lab.get_json("node1", "agent", "/debug/flows")
            if (row["source"], row["destination"]) == ("default/client", "default/ledger")
            and (row["protocol"], row["direction"]) == ("tcp", "outbound")
        ]
        return sum(row["sent"] for row in rows), sum(row["received"] for row in rows)

    def splice(self) -> str:
        supported = self.lab.get_json("node1", "agent", "/debug/status")["splice"]["supported"]
        began, before = time.monotonic(), self._account()
        with Talker(self.client) as talker:
            require(talker.open(self.ledger, 7000).ok, "the client cannot connect")
            for size in (64, 4096):
                past = -1
                # It enters after a few reads, when the agent has looked.
                while True:
                    answer = talker.exchange(size=size, times=200)
                    require(answer.ok, f"the client gets no answer: {answer.error}")
                    past, last = answer["received"] - answer["by_tcp"], past
                    if past > last >= 0 or not supported:
                        break
                    require(time.monotonic() < began + 10, "everything goes by TCP")
            sent, received = answer["sent"], answer["received"]
        told = (before[0] + sent, before[1] + received)
        wait_until(lambda: self._account() == told, 5.0, f"the kernel's account says {told}")
        ways = (
            f"{past} of {received} bytes came past TCP"
            if supported
            else "by TCP (the splice needs Linux 6.3)"
        )
        return f"{ways}; the kernel's account is the same to the byte"

    def figures(self) -> str:
        url = f"http://{self.web}/"
        with Traffic(
            self.client, "http_client", url, "--count", 5000, "--per-connection", 50, "--interval", 0.005
        ):
            done = self.lab.mycel("stat", check=False)
        require(done.returncode == 0, f"mycel stat: {done.stdout}")
        require("web-app" in done.stdout, f"mycel stat does not know web-app: {done.stdout}")
        return "mycel stat says:\n" + "\n".join(
            f"         {line}" for line in done.stdout.rstrip().splitlines()
        )


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.0f} ms (median of {len(seconds)}, worst {max(seconds) * 1000:.0f})"


def main() -> int:
    print(
        "Mycel demo: two nodes on this machine, a client, web-app v1 on one and v2 on the other.\n",
        flush=True,
    )
    try:
        with Lab(nodes=2, ipv6=True) as lab:
            demo = Demo(lab)
            print(f"set up in {lab.start_seconds:.1f} s\n", flush=True)
            story = Story()
            story.chapter("a canary of 80/20 is split by request", demo.canary)
            story.chapter("between the nodes there is mutual TLS and no plain byte", demo.encrypted)
            story.chapter("under STRICT a stranger is refused", demo.strict)
            story.chapter("IPv6 goes the same ways", demo.ipv6)
            story.chapter(
                "a policy change denies a client on another node within a second", demo.policy_change
            )
            story.chapter("a client on the same node is denied in the kernel", demo.denied_in_the_kernel)
            story.chapter("UDP to a service is answered, and judged", demo.datagrams)
            story.chapter("a NetworkPolicy lets in whom it names", demo.network_policy)
            story.chapter("mycel why says beforehand what happens, and which policy decides", demo.why)
            story.chapter("on one node bytes go past TCP, and none is missing in the accounts", demo.splice)
            story.chapter("the mesh shows what it does", demo.figures)
            return story.summary()
    except LabError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
