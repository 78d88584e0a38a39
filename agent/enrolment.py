"""Word for the CNI plugin of which namespaces are outside, for the time when this agent is away.

What is left is what the controller last said: a namespace that does not ask for the mesh, and in which no pod of ours is. A pod
that asks for itself in such a namespace, made while the agent is away, starts outside and comes in when the agent is back.
"""

from __future__ import annotations

from pathlib import Path

from agent.mesh import Mesh
from cni import protocol
from common import logs
from controlplane.api import Workload

_log = logs.get(__name__)


class EnrolmentFile:
    """``enrolment.json`` in the run folder, written when what is in it changes."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._written: list[str] | None = None

    def write(self, mesh: Mesh) -> None:
        """Failure is logged: then pods of such namespaces wait for the agent as others do."""
        outside = set(mesh.config.outside_namespaces)
        for resource in mesh.resources.values():
            if isinstance(resource, Workload) and resource.enrolled:
                outside.discard(resource.namespace)
        names = sorted(outside)
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
