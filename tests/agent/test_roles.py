"""Whose pod a process is, by its cgroup, and which cgroups have a role."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import api
from agent.kernel import MapFullError
from agent.processes import Cgroup, cgroup
from agent.proxies import ProxyRefused
from agent.roles import Roles, vouch
from bpf.wire import Role
from controlplane.api import Workload
from tests.agent.fakes import FakeKernel

UID = "0e1f2d3c-aaaa-4bbb-8ccc-0123456789ab"
PATHS = [
    f"/sys/fs/cgroup/kubepods/burstable/pod{UID}/4f2b",
    f"/sys/fs/cgroup/kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice/cri-containerd-4f2b.scope",
    f"/host/kind/kubelet/kubepods/pod{'f' * 8}-1111-4111-8111-{'f' * 12}/kubepods/besteffort/pod{UID}/x",
]


def pod(namespace: str, service_account: str) -> dict[str, Workload]:
    return {UID: Workload(UID, namespace, "some-pod", service_account, "n1", "spiffe://d/ns/n/sa/s")}


@pytest.mark.parametrize("path", PATHS)
def test_a_proxys_own_pod(path: str):
    for role in api.Role:
        workloads = pod("mycel-system", f"mycel-{role.value}")
        vouch(role, Cgroup(Path(path), 7), namespace="mycel-system", workloads=workloads)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("namespace", "account"),
    [("default", "mycel-nodeproxy"), ("mycel-system", "default"), ("mycel-system", "mycel-l7proxy")],
)
def test_anothers(path: str, namespace: str, account: str):
    with pytest.raises(ProxyRefused, match=f"pod {namespace}/some-pod of service account {account}"):
        vouch(
            api.Role.NODEPROXY,
            Cgroup(Path(path), 7),
            namespace="mycel-system",
            workloads=pod(namespace, account),
        )


@pytest.mark.parametrize("path", PATHS)
def test_a_cgroup_that_a_pod_made_with_the_name_of_anothers(path: str):
    own = "11111111-aaaa-4bbb-8ccc-0123456789ab"
    workloads = pod("mycel-system", "mycel-nodeproxy")
    workloads[own] = Workload(own, "default", "intruder", "default", "n1", "spiffe://d/ns/n/sa/s")
    inside = Path(path.replace(UID, own).replace(UID.replace("-", "_"), own.replace("-", "_")), f"pod{UID}/x")
    with pytest.raises(ProxyRefused, match="pod default/intruder"):
        vouch(api.Role.NODEPROXY, Cgroup(inside, 7), namespace="mycel-system", workloads=workloads)


def test_who_is_not_known_is_not_anothers():
    for path in (PATHS[0], "/sys/fs/cgroup/system.slice/mycel-nodeproxy.service"):
        vouch(api.Role.NODEPROXY, Cgroup(Path(path), 7), namespace="mycel-system", workloads={})


class SmallKernel(FakeKernel):
    """Has room for three roles."""

    def set_role(self, cgroup_id: int, role: Role) -> None:
        if role is Role.NONE:
            self.fake_roles.pop(cgroup_id, None)
        elif len(self.fake_roles | {cgroup_id: role}) > 3:
            raise MapFullError(7, "no room for another element")
        else:
            self.fake_roles[cgroup_id] = role


def test_what_the_kernel_has_lost_is_given_again(tmp_path: Path):
    """A proxy without its role would be an application to the kernel; a cgroup that is gone, or has none any more, gets none."""
    kernel = SmallKernel()
    roles = Roles(kernel, own=None, hierarchy=tmp_path)
    folders = [tmp_path / name for name in ("kubelet", "nodeproxy", "gone")]
    for folder in folders:
        folder.mkdir()
    kubelet, nodeproxy, gone = map(cgroup, folders)
    roles.only(Role.PROBER, kubelet)
    roles.register(api.Role.NODEPROXY, nodeproxy)
    roles.register(api.Role.L7PROXY, gone)
    assert roles.repair() == 0
    folders[2].rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    kernel.fake_roles = {kubelet.id: Role.ENVOY}
    assert roles.repair() == 2
    assert kernel.roles() == {kubelet.id: Role.PROBER, nodeproxy.id: Role.NODEPROXY}
    roles.only(Role.PROBER, None)
    assert roles.repair() == 0
    assert kernel.roles() == {nodeproxy.id: Role.NODEPROXY}
    kernel.close()


def test_proxies_that_are_gone_make_room(tmp_path: Path):
    """One that crashes again and again has a cgroup of its own each time, and the agent lives on."""
    kernel = SmallKernel()
    roles = Roles(kernel, own=None, hierarchy=tmp_path)
    living = []
    for number in range(20):
        folder = tmp_path / f"pod{number}"
        folder.mkdir()
        living.append(folder)
        roles.register(api.Role.NODEPROXY, cgroup(folder))
        if number >= 2:
            # The number of a folder that is gone may be the next one's, which a cgroup's never is.
            living.pop(0).rename(tmp_path.with_name(f"{tmp_path.name}-{number}"))
    assert {cgroup(folder).id for folder in living} <= kernel.roles().keys()
    more = tmp_path / "more"
    more.mkdir()
    kernel.fake_roles = {cgroup(folder).id: Role.NODEPROXY for folder in living} | {
        cgroup(tmp_path).id: Role.L7PROXY
    }
    with pytest.raises(ProxyRefused, match="no room"):
        roles.register(api.Role.NODEPROXY, cgroup(more))
    kernel.close()
