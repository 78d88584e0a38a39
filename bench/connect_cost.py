"""Row ``connect-cost``: connect() where there are 10,000 services with 100,000 endpoints, against one service with one endpoint.

Two labs of one node each stand side by side, each with the whole mesh, and all that they know came from their controller. A pod
in the mesh dials services of the one and of the other in turns, every time another of the ten thousand; the endpoints are
addresses of one pod outside of the mesh, so that the way is the same and every endpoint answers.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from bench import stats
from lab.errors import LabError
from lab.lab import Lab
from lab.place import PYTHON
from lab.pod import Pod
from lab.processes import wait_until

ROWS = ("connect-cost",)

SERVICES = 10_000
ENDPOINTS = 10
ROUNDS = 15
#: Connections of one round, and UDP sockets connected.
DIALS = 1500
_DIALLER = Path(__file__).with_name("dialler.py")
_PORT = 8080
_NAMESPACE = "bench-connect"
#: Of the endpoints, all at one pod.
_SUBNET = "10.200.0.0/13"
#: Seconds until ten thousand services are in force.
_GIVE_UP = 300.0


class ConnectCostError(Exception):
    """The figure could not be measured."""


def measure(
    *, say: Callable[[str], None], services: int = SERVICES, rounds: int = ROUNDS, dials: int = DIALS
) -> dict[str, Any]:
    """``connect_cost``: median nanoseconds with one service and with many, the ratio with its 95 % bounds, for TCP and UDP.

    ``agent_pss_mb`` is the agent's memory with one and with many.

    :raises ConnectCostError: with what went wrong.
    """
    try:
        with ExitStack() as stack:
            one = stack.enter_context(_Side(1, 1))
            many = stack.enter_context(_Side(services, ENDPOINTS))
            say(
                f"connect-cost: {services} services with {services * ENDPOINTS} endpoints in {many.seconds:.0f} s"
            )
            times: dict[tuple[str, str], list[float]] = {}
            for side in (one, many):
                side.dial("tcp", dials)
            for number in range(rounds):
                for kind in ("tcp", "udp"):
                    # Each goes first in every other round.
                    for name, side in (("one", one), ("many", many))[:: -1 if number % 2 else 1]:
                        times.setdefault((kind, name), []).append(side.dial(kind, dials))
            memory = {"one": one.agent_pss_mb(), "many": many.agent_pss_mb()}
    except (LabError, OSError, ValueError, subprocess.SubprocessError) as error:
        raise ConnectCostError(f"connect-cost: {error!r}") from error
    found: dict[str, Any] = {"services": services, "endpoints": services * ENDPOINTS, "agent_pss_mb": memory}
    for kind in ("tcp", "udp"):
        ratio = stats.ratio(times[kind, "many"], times[kind, "one"])
        found[kind] = {
            "one_ns": round(median(times[kind, "one"])),
            "many_ns": round(median(times[kind, "many"])),
            "ratio": round(ratio.value, 3),
            "ratio_95": [round(ratio.low, 3), round(ratio.high, 3)],
        }
    return {"connect_cost": found}


class _Side:
    """One lab."""

    def __init__(self, services: int, endpoints: int) -> None:
        self._services = services
        self._endpoints = endpoints
        self._stack = ExitStack()

    def __enter__(self) -> _Side:
        try:
            self._lab = self._stack.enter_context(Lab(nodes=1))
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exit: object) -> None:
        self._stack.close()

    def _build(self) -> None:
        lab = self._lab
        lab.namespace(_NAMESPACE)
        lab.namespace("outside", mesh=False)
        server = lab.pod("server", namespace="outside")
        server.ip(f"route add local {_SUBNET} dev lo\n")
        server.serve([PYTHON, "-I", str(_DIALLER), "serve", str(_PORT)], _PORT)
        self._client = lab.pod("client", namespace=_NAMESPACE)
        self._client.ip(f"route add {_SUBNET} via {server.address}\n")
        lab.settle()
        began = time.monotonic()
        addresses = [f"10.112.{number >> 8}.{number & 255}" for number in range(self._services)]
        objects = list(_objects(addresses, self._endpoints))
        lab.apply(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}), name="services.json")
        self._start_dialler(self._client, addresses)

        def answered() -> bool:
            try:
                return bool(self._ask("tcp-last", 1))
            except LabError:
                return False

        # Services are written in the order of their names.
        wait_until(answered, _GIVE_UP, "the last of the services is in force")
        self.seconds = time.monotonic() - began

    def _start_dialler(self, client: Pod, addresses: Sequence[str]) -> None:
        self._process = client.popen(
            [PYTHON, "-I", str(_DIALLER), "dial", str(_PORT)], stdin=subprocess.PIPE, stderr=None
        )
        assert self._process.stdin is not None
        self._stack.callback(self._process.wait)
        self._stack.callback(self._process.kill)
        self._process.stdin.write(json.dumps(list(addresses)) + "\n")
        self._process.stdin.flush()

    def dial(self, kind: str, count: int) -> float:
        """Median nanoseconds of connect().

        :raises LabError: one failed.
        """
        return self._ask(kind, count)

    def _ask(self, kind: str, count: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{kind} {count}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        try:
            return float(line)
        except ValueError:
            raise LabError(f"the dialler says {line.strip()!r}") from None

    def agent_pss_mb(self) -> float:
        total = 0
        for pid in self._lab.processes_of("node1", "agent"):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        return round(total / 1e6, 1)


def _objects(addresses: Sequence[str], endpoints: int) -> Iterator[dict[str, Any]]:
    number = 0
    for index, address in enumerate(addresses):
        name = f"service-{index:05d}"
        ports = [
            {"name": protocol.lower(), "port": 80, "targetPort": _PORT, "protocol": protocol}
            for protocol in ("TCP", "UDP")
        ]
        yield {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": _NAMESPACE},
            "spec": {"type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "ports": ports},
        }
        backends = []
        for _ in range(endpoints):
            backends.append(f"10.{200 + (number >> 16)}.{number >> 8 & 255}.{number & 255}")
            number += 1
        yield {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{name}-1",
                "namespace": _NAMESPACE,
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": "IPv4",
            "ports": [{"name": port["name"], "port": _PORT, "protocol": port["protocol"]} for port in ports],
            "endpoints": [{"addresses": [backend], "conditions": {"ready": True}} for backend in backends],
        }
