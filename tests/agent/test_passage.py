"""The stages of a pod that joins or leaves as it runs, and how a running pod's namespace is found."""

import os
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from agent import processes, sandboxes
from agent.api import LINGER
from agent.passage import LAST_CALL, POLL, POLL_MOST, SETTLE, Passages, Stage
from lab import cgroups
from tests.agent.pods import Netns

UID = "0b1f6c2e-6c5d-4a7b-9a53-1d6f4f6d0c11"
UNDERSCORES = UID.replace("-", "_")
STATIC = uuid.uuid4().hex


def test_a_pod_of_an_add_is_enrolled_at_once():
    assert Passages().join(1, running=False, reachable=False, now=0.0) is Stage.ENROLLED


def test_the_way_in_and_out():
    passages = Passages()
    join = lambda now, reachable=True: passages.join(1, running=True, reachable=reachable, now=now)  # noqa: E731
    assert join(0.0, False) is Stage.PREPARED
    assert passages.next({1}, 0.0) == POLL
    assert join(99.0, False) is Stage.PREPARED
    assert passages.next({1}, 99.0) == POLL_MOST
    assert passages.next((), 99.0) is None
    assert join(100.0) is Stage.CAPTURED
    assert passages.next({1}, 101.0) == pytest.approx(SETTLE - 1)
    assert join(100.0 + SETTLE - 0.1) is Stage.CAPTURED
    assert join(100.0 + SETTLE) is Stage.ENROLLED
    assert passages.next({1}, 200.0) is None
    assert passages.leave(1, 200.0) is Stage.CAPTURED
    assert passages.leave(1, 200.0 + SETTLE - 0.1) is Stage.CAPTURED
    assert passages.leave(1, 200.0 + SETTLE) is Stage.PREPARED
    assert passages.next({1}, 200.0 + SETTLE) == pytest.approx(LAST_CALL)
    assert passages.leave(1, 200.0 + SETTLE + LAST_CALL) is None
    assert passages.stage(1) is None
    assert passages.leave(1, 300.0) is None


@pytest.mark.parametrize("stage", [Stage.PREPARED, Stage.CAPTURED])
def test_who_turns_round_has_the_time_of_its_stage_before_it(stage):
    """Other nodes have just heard of the first change, and dial by that until they hear of the second."""
    passages = Passages()
    join = lambda now: passages.join(1, running=True, reachable=stage is Stage.CAPTURED, now=now)  # noqa: E731
    assert join(0.0) is Stage.PREPARED
    assert join(10.0) is stage
    assert passages.leave(1, 10.0 + SETTLE - 0.1) is stage
    assert passages.leave(1, 10.0 + 2 * SETTLE - 0.2) is stage
    assert passages.next({1}, 10.0 + 2 * SETTLE - 0.2) == pytest.approx(0.1)
    assert SETTLE > LINGER  # nobody listens there for the mesh afterwards
    if stage is Stage.CAPTURED:
        assert join(10.0 + 2 * SETTLE - 0.1) is Stage.CAPTURED
        assert join(10.0 + 3 * SETTLE - 0.2) is Stage.CAPTURED
        assert join(10.0 + 3 * SETTLE) is Stage.ENROLLED


@pytest.mark.parametrize(
    ("line", "uid"),
    [
        (f"0::/kubepods/besteffort/pod{UID}/0123", UID),
        (f"0::/kubepods/pod{UID}", UID),
        (
            f"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDERSCORES}.slice/cri-containerd-1.scope",
            UID,
        ),
        (f"0::/kubepods.slice/kubepods-pod{UNDERSCORES}.slice/crio-1.scope", UID),
        (f"11:memory:/kubepods/burstable/pod{UID}/0123", UID),
        # As from a cgroup namespace beside it.
        (f"0::/../../besteffort/pod{UID}/0123", UID),
        # kind, and the cluster lab: nodes below a cgroup of their own.
        (f"0::/docker/abc/kubelet/kubepods/pod{UID}/0123", UID),
        # What a container makes below its own is no pod's.
        (f"0::/kubepods/pod{UID}/0123/pod{uuid.uuid4()}", UID),
        (f"0::/kubepods/burstable/pod{STATIC}/0123", STATIC),
        (f"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice/x.scope", STATIC),
        ("0::/system.slice/kubelet.service", ""),
        ("0::/user.slice/podman-1.scope", ""),
        ("0::/", ""),
        ("", ""),
    ],
)
def test_whose_a_cgroup_is(line, uid):
    assert sandboxes.pod_uid(line) == uid


@pytest.mark.privileged
@pytest.mark.parametrize("static", [False, True], ids=["of-api-server", "static"])
def test_a_namespace_is_found_by_cgroup_and_address(tmp_path, static):
    """Neither the node's own nor one that a container of the pod has made for itself.

    A static pod's cgroup is named by its manifest, and the API server knows it by its mirror.
    """
    uid = str(uuid.uuid4())
    top = cgroups.root() / f"mycel-node-{uid[:8]}"
    pod = top / f"pod{uuid.uuid4().hex if static else uid}"
    held: list[subprocess.Popen[bytes]] = []

    def run(*command: str) -> int:
        process = subprocess.Popen([*cgroups.joining(pod), *command])
        held.append(process)
        return process.pid

    with Netns() as own, Netns() as made:
        own.add_address("10.98.7.1/24")
        try:
            pod.mkdir(parents=True)
            node_process = run("sleep", "60")
            in_namespace(run("nsenter", f"--net={made.path}", "sleep", "60"), made)
            cgroups_ready(pod, 2)
            host = processes.netns_inode_of("self")
            assert sandboxes.find([(uid, ("10.98.7.1",))], not_in=(host,)) == {}
            in_namespace(run("nsenter", f"--net={own.path}", "sleep", "60"), own)
            cgroups_ready(pod, 3)
            found = sandboxes.find(
                [(uid, ("10.98.7.1",)), (str(uuid.uuid4()), ("10.98.7.1" if not static else "10.98.7.2",))],
                not_in=(host,),
            )
            assert set(found) == {uid}
            sandbox = found[uid]
            assert sandbox.inode == Path(own.path).stat().st_ino
            assert sandbox.pid != node_process
            assert set(sandbox.interfaces) == {"lo", "eth0", "peer0"}
            os.close(sandbox.fd)
        finally:
            for process in held:
                process.kill()
                process.wait()
            cgroups.remove(top)


def cgroups_ready(cgroup: Path, count: int) -> None:
    deadline = time.monotonic() + 5
    while len((cgroup / "cgroup.procs").read_text().split()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def in_namespace(pid: int, netns: Netns) -> None:
    deadline = time.monotonic() + 5
    while processes.netns_inode_of(pid) != Path(netns.path).stat().st_ino:
        assert time.monotonic() < deadline
        time.sleep(0.01)
