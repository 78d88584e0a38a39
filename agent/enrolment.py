"""Which namespaces are outside: for the agent while no controller answers, and word of it for the CNI plugin while no agent does.

It is what the controller last said: a namespace that does not ask for the mesh, and in which no pod of ours is. A pod that asks
for itself in such a namespace, made while agent or controllers are away, starts outside and comes in when they are back.
"""

from __future__ import annotations

from pathlib import Path

from agent.mesh import Mesh
from cni import protocol
from common import logs
from controlplane.api import Workload

_log = logs.get(__name__)


def outside(mesh: Mesh) -> frozenset[str]:
    """The namespaces in which no pod is in the mesh, as the controller said last."""
    names = set(mesh.config.outside_namespaces)
    for resource in mesh.resources.values():
        if isinstance(resource, Workload) and resource.enrolled:
            names.discard(resource.namespace)
    return frozenset(names)


class EnrolmentFile:
    """``enrolment.json`` in the run folder, written when what is in it changes."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._written: list[str] | None = None

    def write(self, mesh: Mesh) -> None:
        """Failure is logged: then pods of such namespaces wait for the agent as others do."""
        names = sorted(outside(mesh))
        if names == self._written:
            return
        try:
            protocol.write_outside(str(self._run), names)
        except OSError as error:
            _log.error(
                "namespaces outside of the mesh cannot be noted", run=str(self._run), reason=str(error)
            )
            return
        self._written = names
