"""Which cgroups have which role in the kernel: our own processes, the prober's, a real Envoy's.

Owns the rule that a cgroup has one role, so that no process gets another's exemptions by sharing its cgroup.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from agent import api, processes
from agent.kernel import Kernel, KernelError, MapFullError
from agent.proxies import ProxyRefused
from bpf.wire import Role
from common import logs
from controlplane.api import Workload

_log = logs.get(__name__)

_OF_PROXIES = {api.Role.NODEPROXY: Role.NODEPROXY, api.Role.L7PROXY: Role.L7PROXY}


#: The part of a container's cgroup that kubelet names after its pod, by either cgroup driver.
_POD = re.compile(r"pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})")


def vouch(
    role: api.Role, cgroup: processes.Cgroup, *, namespace: str, workloads: Mapping[str, Workload]
) -> None:
    """Whose pod it is, kubelet says by the cgroup that it made: nothing within a pod can change that.

    Who mounts our run folder and is in our group could say Hello; the pod of another service account is refused. A pod that
    the controller has not told of (yet) is not another's.

    :param namespace: of the mesh's own pods.
    :raises ProxyRefused: it is no pod of this proxy.
    """
    expected = (namespace, f"mycel-{role.value}")
    # All of them: a container that may make cgroups can make one below its own with the name of another's pod.
    for uid in _POD.findall(str(cgroup.path)):
        workload = workloads.get(uid.replace("_", "-"))
        if workload is not None and (workload.namespace, workload.service_account) != expected:
            raise ProxyRefused(
                f"pod {workload.namespace}/{workload.name} of service account {workload.service_account} is no "
                f"{role.value}: that is {'/'.join(expected)}"
            )


class RoleError(Exception):
    """A cgroup cannot have the role."""


class Roles:
    """The map ``roles``."""

    def __init__(self, kernel: Kernel, *, own: processes.Cgroup | None, hierarchy: Path) -> None:
        """``own`` is the agent's cgroup, ``hierarchy`` the node's part of the cgroup hierarchy."""
        self._kernel = kernel
        self._own = own
        self._hierarchy = hierarchy
        self._fixed: dict[int, Role] = {}
        self._given: dict[int, tuple[processes.Cgroup, Role]] = {}

    def repair(self) -> int:
        """Give again what was given here and the kernel has not; how many those were.

        :raises KernelError: it cannot be looked at.
        """
        there = self._kernel.roles()
        lost = [(one, role) for one, role in tuple(self._given.values()) if there.get(one.id) is not role]
        repaired = 0
        for one, role in lost:
            if not _is_there(one):
                self._given.pop(one.id, None)
                continue
            self._kernel.set_role(one.id, role)
            _log.warning(
                "kernel state is not as it was written: repaired",
                what="role",
                which=str(one.path),
                role=role.name,
            )
            repaired += 1
        return repaired

    def forget_gone(self) -> None:
        """Remove the roles of cgroups that are no more (proxies of an earlier time)."""
        alive = set()
        for folder, _, _ in os.walk(self._hierarchy):
            with contextlib.suppress(FileNotFoundError):  # containers end all the time
                alive.add(os.stat(folder).st_ino)
        for cgroup_id, role in self._kernel.roles().items():
            if cgroup_id not in alive:
                self._kernel.set_role(cgroup_id, Role.NONE)
                _log.debug("role of a cgroup that is gone removed", cgroup_id=cgroup_id, role=role.name)

    def fix(self, cgroup: processes.Cgroup, role: Role) -> None:
        """Give a role that the command line names.

        :raises RoleError: the cgroup has another, or the kernel refuses.
        """
        self._give(cgroup, role)
        self._fixed[cgroup.id] = role

    def only(self, role: Role, cgroup: processes.Cgroup | None) -> None:
        """Give a role that one cgroup has at most; any other loses it.

        :raises RoleError: as :meth:`fix`.
        """
        try:
            for cgroup_id, found in self._kernel.roles().items():
                if found is role and (cgroup is None or cgroup_id != cgroup.id):
                    self._kernel.set_role(cgroup_id, Role.NONE)
                    self._fixed.pop(cgroup_id, None)
                    self._given.pop(cgroup_id, None)
        except KernelError as error:
            raise RoleError(str(error)) from None
        if cgroup is not None:
            self.fix(cgroup, role)

    def register(self, role: api.Role, cgroup: processes.Cgroup) -> None:
        """Give a proxy's cgroup its role.

        :raises ProxyRefused: it must not have it.
        """
        try:
            self._give(cgroup, _OF_PROXIES[role])
        except RoleError as error:
            raise ProxyRefused(str(error)) from None

    def _give(self, cgroup: processes.Cgroup, role: Role) -> None:
        if self._own is not None and cgroup.id == self._own.id:
            raise RoleError(f"cgroup {cgroup.path} is the agent's: each process needs one of its own")
        if cgroup.id == 1:
            raise RoleError("the root cgroup can have no role: others run in it too")
        fixed = self._fixed.get(cgroup.id, role)
        if fixed is not role:
            raise RoleError(f"cgroup {cgroup.path} has the role {fixed.name.lower()} already")
        before = self._kernel.roles().get(cgroup.id, Role.NONE)
        if before not in (Role.NONE, role):
            # Of an earlier time: what runs there now is what counts, and it is one of ours.
            _log.warning("cgroup changes its role", cgroup=str(cgroup.path), old=before.name, new=role.name)
        try:
            try:
                self._kernel.set_role(cgroup.id, role)
            except MapFullError:
                # A proxy that crashes again and again has another cgroup each time.
                self.forget_gone()
                self._kernel.set_role(cgroup.id, role)
        except (KernelError, MapFullError) as error:
            raise RoleError(f"cgroup {cgroup.path}: {error}") from None
        self._given[cgroup.id] = (cgroup, role)


def _is_there(one: processes.Cgroup) -> bool:
    try:
        return one.path.stat().st_ino == one.id
    except OSError:
        return False
