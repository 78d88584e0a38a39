"""Small servers and clients on a cluster, for tests: one call each, ready when it comes back."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from lab.errors import LabError
from lab.kubernetes import Kubernetes
from lab.processes import wait_until

#: Seconds that the proxies of the run's mesh let connections end by themselves, when they are told to end.
DRAIN = 10
#: busybox, curl, Python and ``lab/apps`` in ``/apps``.
IMAGE = os.environ.get("MYCEL_APPS_IMAGE") or "mycel.io/lab/apps:1"


class Pod:
    """A running pod."""

    def __init__(self, cluster: Kubernetes, namespace: str, name: str) -> None:
        self._cluster = cluster
        self.namespace = namespace
        self.name = name

    @property
    def manifest(self) -> dict[str, Any]:
        return self._cluster.get("pod", self.name, "-n", self.namespace)

    @property
    def address(self) -> str:
        return str(self.manifest["status"]["podIP"])

    @property
    def uid(self) -> str:
        return str(self.manifest["metadata"]["uid"])

    @property
    def node(self) -> str:
        return str(self.manifest["spec"]["nodeName"])

    @property
    def restarts(self) -> int:
        return sum(status["restartCount"] for status in self.manifest["status"]["containerStatuses"])

    def run(self, *argv: object, check: bool = True, timeout: float = 30.0) -> str:
        """Run a command in it (``kubectl exec``); its output and errors.

        :raises LabError: another status than 0, with ``check``.
        """
        return self._cluster.kubectl(
            "exec", "-n", self.namespace, self.name, "--", *argv, check=check, timeout=timeout
        )

    def curl(self, url: str, *options: object) -> dict[str, Any]:
        """GET a JSON document of one of our servers.

        :raises LabError: no answer within 5 seconds, or an error status.
        """
        answer: dict[str, Any] = json.loads(self.run("curl", "-sSf", "-m", 5, *options, url))
        return answer

    def reaches(self, url: str) -> bool:
        """Whether a server answers at all; whatever its status."""
        try:
            self.run("curl", "-sS", "-o", "/dev/null", "-m", 3, url)
        except LabError:
            return False
        return True

    def logs(self) -> str:
        return self._cluster.kubectl("logs", "-n", self.namespace, self.name)

    def delete(self, *, wait: bool = True) -> None:
        self._cluster.kubectl("delete", "pod", "-n", self.namespace, self.name, f"--wait={str(wait).lower()}")


class Apps:
    """Makes workloads in one namespace."""

    def __init__(self, cluster: Kubernetes, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self._together: list[dict[str, Any]] | None = None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is made inside is applied and waited for at once, at its end."""
        made = self._together = []
        try:
            yield
        finally:
            self._together = None
        self.cluster.apply(*made)
        names = [item["metadata"]["name"] for item in made if item["kind"] == "Deployment"]
        self.wait_available(*names)

    def _apply(self, *objects: dict[str, Any]) -> None:
        if self._together is None:
            self.cluster.apply(*objects)
        else:
            self._together += objects

    def server(
        self,
        name: str,
        *,
        version: str = "v1",
        service: str = "",
        replicas: int = 1,
        node: str = "",
        labels: dict[str, str] | None = None,
        grace: int = 2,
        wait: bool = True,
    ) -> None:
        """A Deployment of HTTP servers on 8080 (readiness probe on it), and a Service of port 80 in front.

        :param service: the Service's name and label ``app``; ``name`` by default, so that several versions may share one.
        :param grace: ``terminationGracePeriodSeconds``.
        """
        app = service or name
        container = {
            "name": "server",
            "image": IMAGE,
            "command": ["python3", "/apps/http_server.py", "8080", "--version", version],
            "env": [{"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
            "ports": [{"name": "http", "containerPort": 8080}],
            "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}, "periodSeconds": 1},
        }
        self.deployment(
            name,
            container,
            labels={"app": app, "version": version, **(labels or {})},
            replicas=replicas,
            node=node,
            grace=grace,
            wait=wait,
        )
        spec = {"selector": {"app": app}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}
        self._apply(self._object("v1", "Service", app, spec=spec))

    def deployment(
        self,
        name: str,
        container: dict[str, Any],
        *,
        labels: dict[str, str],
        replicas: int = 1,
        node: str = "",
        grace: int = 1,
        wait: bool = True,
    ) -> None:
        """A Deployment with a service account of its own name."""
        pod = {
            "serviceAccountName": name,
            "terminationGracePeriodSeconds": grace,
            "containers": [container],
            **({"nodeSelector": {"kubernetes.io/hostname": node}} if node else {}),
        }
        spec = {
            "replicas": replicas,
            "selector": {"matchLabels": {**labels, "deployment": name}},
            "template": {"metadata": {"labels": {**labels, "deployment": name}}, "spec": pod},
        }
        self._apply(
            self._object("v1", "ServiceAccount", name), self._object("apps/v1", "Deployment", name, spec=spec)
        )
        if wait and self._together is None:
            self.wait_rolled_out(name)

    def wait_available(self, *names: str, timeout: int = 120) -> None:
        """:raises LabError: not all of these new Deployments are available within ``timeout`` seconds."""
        what = [f"deployment/{name}" for name in names]
        try:
            self.cluster.kubectl(
                *("wait", "-n", self.namespace, *what, "--for=condition=Available", f"--timeout={timeout}s"),
                timeout=timeout + 10,
            )
        except LabError as error:
            seen = self.cluster.kubectl("describe", "pods", "-n", self.namespace, check=False)
            raise LabError(f"{error}\n{seen}") from error

    def wait_rolled_out(self, name: str, timeout: int = 120) -> None:
        """:raises LabError: the Deployment is not available within ``timeout`` seconds; its pods are in the message."""
        try:
            self.cluster.kubectl(
                *("rollout", "status", "-n", self.namespace, f"deployment/{name}", f"--timeout={timeout}s"),
                timeout=timeout + 10,
            )
        except LabError as error:
            seen = self.cluster.kubectl(
                "describe", "pods", "-n", self.namespace, "-l", f"deployment={name}", check=False
            )
            raise LabError(f"{error}\n{seen}") from error

    def client(self, name: str = "client", *, node: str = "", labels: dict[str, str] | None = None) -> Pod:
        """A pod that sleeps, to run commands in."""
        self.sleeper(name, node=node, labels=labels)
        return self.pods(name)[0]

    def sleeper(self, name: str, *, node: str = "", labels: dict[str, str] | None = None) -> None:
        """A Deployment of what :meth:`client` gives."""
        container = {"name": "client", "image": IMAGE}
        self.deployment(name, container, labels={"app": name, **(labels or {})}, node=node)

    def pods(self, deployment: str) -> list[Pod]:
        """The pods of a Deployment that are running and not being deleted."""
        return self.running().get(deployment, [])

    def running(self) -> dict[str, list[Pod]]:
        """All pods that are running and not being deleted, by Deployment."""
        found: dict[str, list[Pod]] = {}
        for item in self.cluster.get("pods", "-n", self.namespace, "-l", "deployment")["items"]:
            if "deletionTimestamp" not in item["metadata"] and item["status"]["phase"] == "Running":
                pod = Pod(self.cluster, self.namespace, item["metadata"]["name"])
                found.setdefault(item["metadata"]["labels"]["deployment"], []).append(pod)
        return found

    def wait_reachable(self, client: Pod, url: str, timeout: float = 20.0) -> None:
        """:raises LabError: the client gets no answer from there within ``timeout`` seconds."""
        wait_until(lambda: client.reaches(url), timeout, f"{client.name} reaches {url}", interval=0.2)

    def _object(self, version: str, kind: str, name: str, **more: Any) -> dict[str, Any]:
        metadata = {"name": name, "namespace": self.namespace}
        return {"apiVersion": version, "kind": kind, "metadata": metadata, **more}
