"""What an agent finds out about its node: the cgroup hierarchy, and which process is kubelet."""

import asyncio
import os
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from agent import host, processes
from agent.prober import Prober
from agent.roles import Roles
from bpf.wire import Role
from lab import cgroups
from tests.agent.fakes import FakeKernel
from tests.agent.pods import Netns

_MOUNT = "30 23 0:26 {root} {point} rw,nosuid - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        ([("/", "/sys/fs/cgroup")], "/sys/fs/cgroup"),
        ([("/", "/sys/fs/cgroup/unified")], "/sys/fs/cgroup/unified"),
        # A container that has joined the node's cgroup namespace: its own part, and the node's folder.
        ([("/kubepods/burstable/pod1/c1", "/sys/fs/cgroup"), ("/", "/host/cgroup")], "/host/cgroup"),
        # The node's own root may be some way down: kind, the cluster lab.
        (
            [("/lab/node1/kubepods/besteffort/pod1/c1", "/sys/fs/cgroup"), ("/lab/node1", "/host/cgroup")],
            "/host/cgroup",
        ),
        # One that has not joined it: the node's is above.
        ([("/", "/sys/fs/cgroup"), ("/../../../..", "/host/cgroup")], "/host/cgroup"),
    ],
)
def test_the_root_of_the_hierarchy(tmp_path, mounts, expected):
    (tmp_path / "self").mkdir()
    lines = "".join(_MOUNT.format(root=root, point=point) for root, point in mounts)
    (tmp_path / "self/mountinfo").write_text("22 1 0:21 / /proc rw - proc proc rw\n" + lines)
    assert host.cgroup_root(tmp_path) == Path(expected)


def test_no_hierarchy_is_an_error(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text("22 1 0:21 / /proc rw - proc proc rw\n")
    with pytest.raises(host.HostError, match="no cgroup v2 hierarchy"):
        host.cgroup_root(tmp_path)


@pytest.mark.privileged
class TestKubelet:
    @pytest.fixture
    def top(self):
        top = cgroups.root() / f"mycel-host-{os.getpid()}"
        for name in (
            "system.slice/kubelet.service",
            "system.slice/other.service",
            "kubepods/x",
            f"pod{uuid.uuid4()}",
        ):
            (top / name).mkdir(parents=True)
        yield top
        cgroups.kill(top)
        cgroups.remove(top)

    @pytest.fixture
    def start(self, tmp_path):
        program = tmp_path / "kubelet"
        shutil.copy("/bin/sleep", program)
        started = []

        def start(cgroup, *before):
            process = subprocess.Popen([*cgroups.joining(cgroup), *before, str(program), "60"])
            started.append(process)
            deadline = time.monotonic() + 5
            while Path(f"/proc/{process.pid}/comm").read_text().strip() != "kubelet":
                assert time.monotonic() < deadline
                time.sleep(0.005)
            return process

        yield start
        for process in started:
            process.kill()
            process.wait()

    def test_it_is_found(self, top, start):
        assert host.find_kubelet(top) is None
        process = start(top / "system.slice/kubelet.service")
        assert host.find_kubelet(top) == (process.pid, processes.cgroup(top / "system.slice/kubelet.service"))

    def test_nobody_can_pass_for_it(self, top, start):
        pod = next(path for path in top.iterdir() if path.name.startswith("pod"))
        start(pod)
        start(top / "kubepods/x")
        start(top / "system.slice/kubelet.service", "setpriv", "--reuid=1000", "--clear-groups", "--")
        with Netns() as other:
            start(top / "system.slice/kubelet.service", "nsenter", f"--net={other.path}")
            start(top / "system.slice/kubelet.service", "unshare", "--user", "--map-root-user")
            assert host.find_kubelet(top) is None

    def test_one_without_a_cgroup_of_its_own_is_refused(self, top, start):
        root = cgroups.root() / f"mycel-alone-{os.getpid()}"
        root.mkdir()
        try:
            process = start(root)
            with pytest.raises(host.HostError, match="not its own"):
                host.find_kubelet(root)
            with pytest.raises(host.HostError, match="not its own"):
                host.find_kubelet(top)
            process.kill()
            process.wait()
        finally:
            cgroups.kill(root)
            cgroups.remove(root)

    async def test_its_role_follows_it(self, top, start, monkeypatch):
        monkeypatch.setattr("agent.prober.ABSENT", 0.02)
        monkeypatch.setattr("agent.prober.PRESENT", 0.05)
        first, second = (
            processes.cgroup(top / "system.slice" / name) for name in ("kubelet.service", "other.service")
        )
        kernel = FakeKernel()
        kernel.set_role(4711, Role.PROBER)  # of an earlier boot of kubelet
        kernel.set_role(4712, Role.NODEPROXY)
        prober = Prober(Roles(kernel, own=None, hierarchy=top), top)
        task = asyncio.create_task(prober.run())

        async def roles(*expected):
            deadline = time.monotonic() + 5
            while {c for c, role in kernel.roles().items() if role is Role.PROBER} != {
                c.id for c in expected
            }:
                assert time.monotonic() < deadline, kernel.roles()
                await asyncio.sleep(0.01)

        try:
            await roles()
            assert "no kubelet" in prober.problem
            process = start(first.path)
            await roles(first)
            assert prober.problem == ""
            (second.path / "cgroup.procs").write_text(str(process.pid))
            await roles(second)
            process.kill()
            process.wait()
            await roles()
            start(first.path)
            await roles(first)
            assert kernel.roles()[4712] is Role.NODEPROXY
        finally:
            task.cancel()
            kernel.close()
