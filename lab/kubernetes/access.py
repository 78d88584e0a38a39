"""Work with a cluster through its API alone, whoever made it: the lab's, or somebody's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from common import kubernetes
from lab.errors import LabError
from lab.kubernetes.control_plane import kubectl


class Kubernetes:
    """A cluster of which a kubeconfig is known."""

    def __init__(self, kubeconfig: Path) -> None:
        self._kubeconfig = kubeconfig

    @property
    def kubeconfig(self) -> Path:
        return self._kubeconfig

    def kubectl(
        self, *arguments: object, input: str | None = None, check: bool = True, timeout: float = 60.0
    ) -> str:
        """Run kubectl and give back what it wrote.

        :raises LabError: it failed (with ``check``), or took over ``timeout`` seconds.
        """
        return kubectl(self.kubeconfig, *arguments, input=input, check=check, timeout=timeout)

    def get(self, *arguments: object) -> dict[str, Any]:
        """``kubectl get ... -o json``."""
        answer: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return answer

    def apply(self, *objects: dict[str, Any] | Path | str) -> None:
        """``kubectl apply`` of objects, files, or YAML; all objects and YAML in one call."""
        for source in objects:
            if isinstance(source, Path):
                self.kubectl("apply", "-f", source)
        texts = [s if isinstance(s, str) else yaml.safe_dump(s) for s in objects if not isinstance(s, Path)]
        if texts:
            self.kubectl("apply", "-f", "-", input="\n---\n".join(texts))

    def client(self) -> kubernetes.Client:
        """A client of the API; it is entered with ``async with``."""
        return kubernetes.Client(kubernetes.Access.load(self.kubeconfig))

    def ready_nodes(self) -> set[str]:
        """The names of the nodes that are ready; none while the API server does not answer."""
        try:
            nodes = self.get("nodes")["items"]
        except LabError:
            return set()
        return {
            node["metadata"]["name"]
            for node in nodes
            if any(
                c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", ())
            )
        }
