"""Row ``cni-add``: what our plugin adds to one CNI ADD, on a node without Python, called as a runtime calls it, one at a time."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from bench.stats import percentile
from lab.errors import LabError
from lab.kubernetes import Cluster
from lab.kubernetes.mesh import Mesh
from lab.kubernetes.node import Node
from lab.processes import wait_until

ROWS = ("cni-add",)

_NAMESPACE = "bench-cni-add"
_IMAGE = "mycel.io/lab/apps:1"
_BINARIES = "/opt/cni/bin"


class CniAddError(Exception):
    """The figure could not be measured."""


def measure(*, say: Callable[[str], None], rounds: int = 200) -> dict[str, Any]:
    """``cni_add_ms``: ``p50`` and ``p99`` of our plugin's ADD of a pod of the mesh, ``start`` of its start alone.

    From the start of its process to the end, without what it costs to enter the node's namespaces (the median of entering for
    nothing, taken in the same rounds). The pod runs: it is taken out of the mesh by DEL and added again, each time as whole as a
    new one. The plugins before ours are not called, their result is that of the pod's real ADD.

    :raises CniAddError: with what went wrong.
    """
    try:
        with Cluster("bench-cni", nodes=1) as cluster:
            mesh = Mesh(cluster)
            mesh.load_images()
            mesh.install()
            mesh.mycel("check", "--wait", "60s", timeout=90)
            return {"cni_add_ms": _rounds(cluster, rounds, say)}
    except (LabError, subprocess.TimeoutExpired, ValueError) as error:
        raise CniAddError(f"cni-add: {error!r}") from error


def _rounds(cluster: Cluster, rounds: int, say: Callable[[str], None]) -> dict[str, float]:
    cluster.kubectl("create", "namespace", _NAMESPACE)
    cluster.kubectl("label", "namespace", _NAMESPACE, "mycel.io/mesh=enabled")
    cluster.kubectl("run", "pod", "-n", _NAMESPACE, f"--image={_IMAGE}", "--restart=Never")
    cluster.kubectl("wait", "-n", _NAMESPACE, "pod/pod", "--for=condition=Ready", "--timeout=60s", timeout=70)
    uid = cluster.get("pod", "pod", "-n", _NAMESPACE)["metadata"]["uid"]
    (node,) = cluster.nodes
    plugin = _Plugin(node, uid)
    entering: list[float] = []
    starts: list[float] = []
    adds: list[float] = []
    for number in range(rounds + 5):
        plugin.call("DEL")
        took = (_timed(node, "true"), plugin.call("VERSION"), plugin.call("ADD"))
        if number >= 5:  # what is slow once only
            for found, one in zip((entering, starts, adds), took, strict=True):
                found.append(one)
        if number % 50 == 49:
            say(f"cni-add {number + 1}/{rounds}")
    free = median(entering)
    return {
        "rounds": rounds,
        "p50": round(percentile(adds, 50) - free, 1),
        "p99": round(percentile(adds, 99) - free, 1),
        "start": round(median(starts) - free, 1),
    }


class _Plugin:
    """Our plugin on a node, with what containerd gave it for one pod, as libcni noted that."""

    def __init__(self, node: Node, uid: str) -> None:
        self._node = node
        notes: list[dict[str, Any]] = []

        def found() -> bool:
            cache = node.root / "var/lib/cni/results"
            notes[:] = [json.loads(note.read_text()) for note in cache.glob("*-eth0")]
            return any(["K8S_POD_UID", uid] in note["cniArgs"] for note in notes)

        wait_until(found, 5.0, "libcni has a note of the pod")
        note = next(note for note in notes if ["K8S_POD_UID", uid] in note["cniArgs"])
        file = min((node.root / "etc/cni/net.d").glob("*.conflist"))
        whole = json.loads(file.read_text())
        own = whole["plugins"][-1]
        self._stdin = json.dumps(
            {
                **own,
                "cniVersion": whole["cniVersion"],
                "name": whole["name"],
                "prevResult": note["result"],
            }
        )
        self._environment = [
            f"CNI_CONTAINERID={note['containerId']}",
            f"CNI_NETNS={note['netns']}",
            f"CNI_IFNAME={note['ifName']}",
            f"CNI_PATH={_BINARIES}",
            "CNI_ARGS=" + ";".join(f"{key}={value}" for key, value in note["cniArgs"]),
        ]
        self._path = f"{_BINARIES}/{own['type']}"

    def call(self, command: str) -> float:
        """Milliseconds. :raises LabError: the plugin's error."""
        return _timed(
            self._node,
            self._path,
            environment=[f"CNI_COMMAND={command}", *self._environment],
            stdin=self._stdin,
        )


def _timed(node: Node, program: str, *, environment: list[str] | None = None, stdin: str = "") -> float:
    command = node.command(["/usr/bin/env", "-i", "PATH=/usr/bin:/bin", *(environment or []), program])
    begin = time.perf_counter()
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    took = (time.perf_counter() - begin) * 1000
    if done.returncode != 0:
        raise LabError(f"{program}: {done.stdout}{done.stderr}")
    return took
