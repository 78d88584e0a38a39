"""Mycel on a cluster of the lab: images built from this checkout, installed by ``mycel install``, ready when it comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab.errors import LabError
from lab.kubernetes import programs
from lab.kubernetes.access import Kubernetes
from lab.kubernetes.cluster import Cluster
from lab.processes import wait_until

NAMESPACE = "mycel-system"
DAEMONS = ("agent", "nodeproxy", "l7proxy")
_CHECKOUT = Path(__file__).resolve().parents[2]


def archives() -> tuple[Path, ...]:
    """Our images as archives, built when the code has changed.

    :raises LabError: they cannot be built.
    """
    done = subprocess.run(
        [sys.executable, "-m", "deploy.images"],
        cwd=_CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    if done.returncode != 0:
        raise LabError(f"images cannot be built: {done.stdout[-2000:]}")
    return tuple(_CHECKOUT / f"build/images/{name}.tar" for name in ("agent", "mesh"))


class Mesh:
    """The mesh on a cluster. Nothing is installed before :meth:`install`.

    :param values: of every installation, as ``mycel install --set`` takes them.
    """

    def __init__(
        self, cluster: Kubernetes, namespace: str = NAMESPACE, *, values: Sequence[str] = ()
    ) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self._values = [word for value in values for word in ("--set", value)]

    def load_images(self) -> None:
        """Build, and give them to every node. On somebody's own cluster the images are theirs to bring."""
        if isinstance(self.cluster, Cluster):
            self.cluster.load(*archives())

    def mycel(self, *arguments: object, check: bool = True, timeout: float = 120.0) -> str:
        """Run the command against this cluster; what it wrote.

        :raises LabError: another status than 0, with ``check``.
        """
        path = f"{programs.folder()}:{os.environ['PATH']}"
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *(str(a) for a in arguments)],
            cwd=_CHECKOUT,
            env={**os.environ, "PATH": path, "KUBECONFIG": str(self.cluster.kubeconfig)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            said = f"{done.stdout[-4000:]}{done.stderr[-1000:]}"
            raise LabError(f"mycel {' '.join(str(a) for a in arguments)}: {said}")
        return done.stdout

    def install(self, *arguments: object, crds: Sequence[str] = ()) -> float:
        """``mycel install | kubectl apply``, until everything is rolled out; the seconds that took."""
        began = time.monotonic()
        if crds:
            arguments = (*arguments, "--crds", ",".join(crds))
        manifests = self.mycel("install", *self._values, *arguments)
        self.cluster.kubectl("apply", "--server-side", "-f", "-", input=manifests, timeout=120)
        self.wait_ready()
        return time.monotonic() - began

    def wait_ready(self, timeout: int = 120) -> None:
        """:raises LabError: something is not rolled out within ``timeout`` seconds; its pods are in the message."""
        parts = ("deployment/mycel-controlplane", *(f"daemonset/mycel-{n}" for n in DAEMONS))
        with ThreadPoolExecutor() as pool:
            for wait in [pool.submit(self._wait_rolled_out, part, timeout) for part in parts]:
                wait.result()

    def _wait_rolled_out(self, part: str, timeout: int) -> None:
        try:
            self.cluster.kubectl(
                *("rollout", "status", "-n", self.namespace, part, f"--timeout={timeout}s"),
                timeout=timeout + 10,
            )
        except LabError as error:
            name = part.partition("/")[2]
            seen = self.cluster.kubectl("get", "pods", "-n", self.namespace, "-o", "wide", check=False)
            said = self.cluster.kubectl("logs", "-n", self.namespace, part, "--tail=20", check=False)
            raise LabError(f"{error}\n{seen}\n{name} says:\n{said}") from error

    def restart(self, part: str, timeout: int = 180) -> float:
        """Roll one part over (``agent``, ``nodeproxy``, ``l7proxy``, ``controlplane``); the seconds that took."""
        began = time.monotonic()
        kind = "deployment" if part == "controlplane" else "daemonset"
        self.cluster.kubectl("rollout", "restart", "-n", self.namespace, f"{kind}/mycel-{part}")
        self._wait_rolled_out(f"{kind}/mycel-{part}", timeout)
        return time.monotonic() - began

    def pods(self, part: str, node: str = "") -> list[str]:
        """Names of the pods of one part that are not on their way out."""
        items = self.cluster.get("pods", "-n", self.namespace)["items"]
        return [
            item["metadata"]["name"]
            for item in items
            if item["metadata"]["name"].startswith(f"mycel-{part}-")
            and "deletionTimestamp" not in item["metadata"]
            and node in ("", item["spec"].get("nodeName"))
        ]

    def logs(self, part: str) -> str:
        """The logs of all pods of one part."""
        return "".join(
            self.cluster.kubectl("logs", "-n", self.namespace, pod, check=False) for pod in self.pods(part)
        )

    def uninstall(self, *arguments: object) -> None:
        self.mycel("uninstall", *arguments)
        wait_until(
            lambda: not self.cluster.kubectl("get", "namespaces", self.namespace, "--ignore-not-found"),
            60.0,
            "the mesh's namespace is gone",
            interval=0.5,
        )
