"""Row ``pod-start``: from creating a pod until its process runs, with our plugin in the node's chain against without."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from common.kubernetes import ApiError, Client, Unreachable, path_of
from lab.errors import LabError
from lab.kubernetes import Cluster
from lab.kubernetes.mesh import Mesh

ROWS = ("pod-start",)

_NAMESPACE = "bench-pod-start"
_IMAGE = "mycel.io/lab/apps:1"
#: Seconds after which a pod's start is a failure.
_GIVE_UP = 60


class PodStartError(Exception):
    """The figure could not be measured."""


def measure(*, say: Callable[[str], None], pods: int = 20) -> dict[str, Any]:
    """``pod_start_ms`` (medians) without the mesh, with it, and what it adds. Half of the pods without are started after it.

    The pods of the middle are in the mesh; all are on one node, one after the other, and named for it, so that no scheduler is
    in between.

    :raises PodStartError: with what went wrong.
    """
    try:
        with Cluster("bench-start", nodes=1) as cluster:
            mesh = Mesh(cluster)
            mesh.load_images()
            cluster.kubectl("create", "namespace", _NAMESPACE)
            cluster.kubectl("label", "namespace", _NAMESPACE, "mycel.io/mesh=enabled")
            node = min(cluster.ready_nodes())
            _starts(cluster, node, 2)  # what is slow once only
            without = _starts(cluster, node, pods // 2)
            say(f"pod-start: {median(without):.0f} ms without")
            mesh.install()
            mesh.mycel("check", "--wait", "60s", timeout=90)
            _starts(cluster, node, 2)
            inside = _starts(cluster, node, pods)
            say(f"pod-start: {median(inside):.0f} ms in the mesh")
            mesh.uninstall("--yes")
            without += _starts(cluster, node, pods - pods // 2)
    except (LabError, ApiError, Unreachable, TimeoutError) as error:
        raise PodStartError(f"pod-start: {error!r}") from error
    return {
        "pod_start_ms": {
            "without": round(median(without), 1),
            "with": round(median(inside), 1),
            "added": round(median(inside) - median(without), 1),
        }
    }


def _starts(cluster: Cluster, node: str, count: int) -> list[float]:
    """Milliseconds of each."""

    async def run() -> list[float]:
        async with cluster.client() as client:
            return [await _start(client, node) for _ in range(count)]

    return asyncio.run(run())


async def _start(client: Client, node: str) -> float:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "start", "namespace": _NAMESPACE},
        "spec": {
            "nodeName": node,
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {
                    "name": "clock",
                    "image": _IMAGE,
                    # One machine, one clock.
                    "command": ["python3", "-ISE", "-c", "import time; print(time.time())"],
                }
            ],
        },
    }
    begin = time.time()
    await client.create(path_of("v1", "pods", _NAMESPACE), pod)
    path = path_of("v1", "pods", _NAMESPACE, "start")
    async with asyncio.timeout(_GIVE_UP):
        while (await client.get(path))["status"].get("phase") != "Succeeded":  # noqa: ASYNC110 (asked of a server)
            await asyncio.sleep(0.1)
    ran = float(await client.get_text(f"{path}/log"))
    await client.delete(path)
    async with asyncio.timeout(_GIVE_UP):
        try:
            while await client.get(path):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        except ApiError as error:
            if error.status != 404:
                raise
    return (ran - begin) * 1000
