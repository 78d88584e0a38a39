"""A pod of a cluster as a place: commands run in it by ``kubectl exec``, so that the lab's clients work there too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lab.kubernetes import programs
from lab.kubernetes.access import Kubernetes
from lab.place import Place


class PodPlace(Place):
    """A pod whose image has ``lab/apps`` in ``/apps``. For commands only: :meth:`socket` and :meth:`ip` are not for it."""

    def __init__(self, cluster: Kubernetes, namespace: str, name: str) -> None:
        nowhere = Path("/nonexistent")
        super().__init__(name, net=nowhere, cgroup=nowhere)
        self._kubeconfig = cluster.kubeconfig
        self._namespace = namespace

    def command(self, command: Sequence[str], *, cgroup: Path | None = None) -> list[str]:
        """The command line that runs ``command`` in it; its end of file is the command's, and ends what reads from it."""
        kubectl = [str(programs.folder() / "kubectl"), f"--kubeconfig={self._kubeconfig}"]
        return [*kubectl, "exec", "--stdin", "--quiet", "-n", self._namespace, self.name, "--", *command]

    def app(self, name: str, *arguments: object) -> list[str]:
        return ["python3", "-I", f"/apps/{name}.py", *map(str, arguments)]
