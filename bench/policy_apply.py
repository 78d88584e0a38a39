"""Row ``policy-apply``: from ``kubectl apply`` of a policy on a two-node cluster until both nodes enforce it."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.kubernetes import Cluster
from lab.kubernetes.mesh import Mesh
from lab.kubernetes.pod import PodPlace

ROWS = ("policy-apply",)

_NAMESPACE = "bench-policy"
_IMAGE = "mycel.io/lab/apps:1"
_PORT = 8080
_PROBER = Path(__file__).with_name("prober.py").read_text()
#: Seconds after which a change that is not in force counts as never enforced.
_GIVE_UP = 20.0


class PolicyApplyError(Exception):
    """The figure could not be measured."""


class _Prober:
    """Dials from one node to one server, and knows when what comes of it last changed."""

    def __init__(self, cluster: Cluster, pod: str, host: str) -> None:
        self.name = f"{pod} to {host}"
        place = PodPlace(cluster, _NAMESPACE, pod)
        self._process = place.popen(
            ["python3", "-I", "-c", _PROBER, host, str(_PORT), host],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._seen = (0, "nothing")
        self._changed = threading.Condition()
        threading.Thread(target=self._read, name=f"prober {self.name}", daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            when, _, outcome = line.strip().partition(" ")
            with self._changed:
                self._seen = (int(when), outcome) if when.isdigit() else (0, line.strip())
                self._changed.notify_all()

    def wait_for(self, *, allowed: bool) -> int:
        """Nanoseconds at which the last change to it was seen."""
        deadline = time.monotonic() + _GIVE_UP
        with self._changed:
            while self._seen[0] == 0 or (self._seen[1] != "refused") is not allowed:
                if not self._changed.wait(deadline - time.monotonic()):
                    wanted = "an answer" if allowed else "a refusal"
                    raise PolicyApplyError(
                        f"{self.name}: {self._seen[1]!r} after {_GIVE_UP:g} s, not {wanted}"
                    )
            return self._seen[0]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(*, say: Callable[[str], None], changes: int = 50) -> dict[str, Any]:
    """``policy_apply_ms``: p50, p99 and the count. A change denies, or allows again, what both nodes' clients ask both nodes for.

    Counted from the start of ``kubectl``, so that its own time (``kubectl_p50``, a dry run's) is in it; its first in a
    cluster's life (``kubectl_first``) is not.

    :raises PolicyApplyError: with what went wrong.
    """
    probers: list[_Prober] = []
    try:
        with Cluster("bench-policy") as cluster:
            mesh = Mesh(cluster)
            mesh.load_images()
            mesh.install(crds=("istio",))
            nodes = sorted(cluster.ready_nodes())
            cluster.apply(*_objects(nodes))
            for node in nodes:
                for name in (f"server-{node}", f"client-{node}"):
                    cluster.kubectl(
                        "wait", "pod", name, "-n", _NAMESPACE, "--for=condition=Ready", "--timeout=60s"
                    )
            try:
                probers += [
                    _Prober(cluster, f"client-{node}", _address(cluster, f"server-{to}"))
                    for node in nodes
                    for to in nodes
                ]
                cluster.apply(_policy(allowed=True))
                own, first = _own_times(cluster)
                times = _changes(cluster, probers, changes, say)
            finally:
                for prober in probers:
                    prober.stop()
    except LabError as error:
        raise PolicyApplyError(str(error)) from error
    times.sort()
    return {
        "policy_apply_ms": {
            "p50": round(times[len(times) // 2], 1),
            "p99": round(times[min(len(times) - 1, int(len(times) * 0.99))], 1),
            "changes": len(times),
            "kubectl_p50": round(own, 1),
            "kubectl_first": round(first, 1),
        }
    }


def _changes(
    cluster: Cluster, probers: list[_Prober], changes: int, say: Callable[[str], None]
) -> list[float]:
    times = []
    for prober in probers:
        prober.wait_for(allowed=True)
    for number in range(changes):
        allowed = number % 2 == 1
        time.sleep(0.1)
        began = time.monotonic_ns()
        cluster.apply(_policy(allowed=allowed))
        applied = (time.monotonic_ns() - began) / 1e6
        times.append((max(prober.wait_for(allowed=allowed) for prober in probers) - began) / 1e6)
        say(f"policy-apply {number + 1}/{changes}: {times[-1]:.0f} ms, kubectl {applied:.0f}")
    return times


def _own_times(cluster: Cluster) -> tuple[float, float]:
    """Milliseconds of a ``kubectl apply`` of a change that is not made: the median of five, and the first.

    At the first of a cluster the API server makes the document of all schemas that kubectl wants: a second or two, with a mesh
    or without.
    """
    times = []
    for _ in range(5):
        began = time.monotonic()
        cluster.kubectl("apply", "--dry-run=server", "-f", "-", input=json.dumps(_policy(allowed=False)))
        times.append((time.monotonic() - began) * 1000)
    return sorted(times)[2], times[0]


def _address(cluster: Cluster, pod: str) -> str:
    return str(cluster.get("pod", pod, "-n", _NAMESPACE)["status"]["podIP"])


def _policy(*, allowed: bool) -> dict[str, Any]:
    """Denies the clients, or somebody who is not there."""
    account = "nobody" if allowed else "client"
    principal = f"cluster.local/ns/{_NAMESPACE}/sa/{account}"
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "changing", "namespace": _NAMESPACE},
        "spec": {
            "action": "DENY",
            "selector": {"matchLabels": {"app": "server"}},
            "rules": [{"from": [{"source": {"principals": [principal]}}]}],
        },
    }


def _objects(nodes: list[str]) -> list[dict[str, Any]]:
    namespace = {"name": _NAMESPACE, "labels": {"mycel.io/mesh": "enabled"}}
    made: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": namespace},
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "client", "namespace": _NAMESPACE},
        },
    ]
    for node in nodes:
        server = ["python3", "/apps/http_server.py", str(_PORT), "--name", f"{node}."]
        for app, command in (("server", server), ("client", ["sleep", "infinity"])):
            made.append(
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {
                        "name": f"{app}-{node}",
                        "namespace": _NAMESPACE,
                        "labels": {"app": app},
                    },
                    "spec": {
                        "nodeName": node,
                        "serviceAccountName": "client" if app == "client" else "default",
                        "terminationGracePeriodSeconds": 0,
                        "containers": [{"name": app, "image": _IMAGE, "command": command}],
                    },
                }
            )
    return made
