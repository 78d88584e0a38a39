"""A cluster of the lab leaves nothing behind, also when whoever made it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from lab import cgroups, state
from lab.kubernetes import Cluster
from lab.kubernetes.cluster import names
from lab.processes import wait_until
from tests.cluster.apps import Apps
from tests.requirements import ROOT, require_root


def test_nothing_is_left_when_its_owner_is_killed():
    require_root()
    name = f"kill{os.getpid()}"
    owner = subprocess.Popen(
        [sys.executable, "-m", "lab.kubernetes", "up", "--name", name, "--nodes", "1"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline().startswith(f"cluster {name}: 1 nodes")
    try:
        cluster = Cluster.attach(name)
        cluster.kubectl("create", "namespace", "some")
        Apps(cluster, "some").client()
        lab, links = cluster.state, cluster.state.links
        pids = cgroups.processes(lab.cgroup)
        assert len(pids) > 10
        assert len(links) == 1
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)
    assert name not in names()
    # The next lab of any kind does this first; another's may have been quicker, and still be at it.
    state.reap_stale()
    wait_until(lambda: not lab.folder.exists(), 30.0, "the folder is gone")
    for hierarchy in cgroups.hierarchies():
        assert not list(hierarchy.glob(f"*{lab.cgroup.name}*"))
    wait_until(lambda: not links & set(os.listdir("/sys/class/net")), 10.0, "the link is gone")
    mounts = Path("/proc/self/mounts").read_text()
    assert str(lab.folder) not in mounts
    wait_until(lambda: not any(_runs(pid) for pid in pids), 10.0, "its processes are gone")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
