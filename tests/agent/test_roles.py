"""Whose pod a process is, by its cgroup."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import api
from agent.processes import Cgroup
from agent.proxies import ProxyRefused
from agent.roles import vouch
from controlplane.api import Workload

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


def test_who_is_not_known_is_not_anothers():
    for path in (PATHS[0], "/sys/fs/cgroup/system.slice/mycel-nodeproxy.service"):
        vouch(api.Role.NODEPROXY, Cgroup(Path(path), 7), namespace="mycel-system", workloads={})
