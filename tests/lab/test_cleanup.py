"""Nothing is left of a lab, however it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import Lab, cgroups, state
from lab.kubernetes.cluster import LINK
from tests.requirements import ROOT

pytestmark = pytest.mark.privileged

#: A lab of its own process, with all that could stay behind: pods, a pin, a mount, a daemon that left its parent.
SCRIPT = """
import sys, time
from lab import Lab
with Lab(nodes=2, mesh=False) as lab:
    lab.namespace("default")
    for node in ("node1", "node2"):
        pod = lab.pod(f"pod-{node}", node=node)
        pod.serve(pod.app("tcp_server", 9000), 9000)
        pod.run(["/bin/sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 &"])
        place = lab.node(node)
        place.run(["/bin/sh", "-c", "mkdir /sys/fs/bpf/mycel; mount -t tmpfs lab /mnt"])
    print(lab.id, flush=True)
    time.sleep(1000)
"""


#: Where nodes mount something of their own. Other tests on the machine may mount elsewhere at the same time.
PLACES = ("/run", "/var/lib", "/etc/cni/net.d", "/sys/fs/bpf", "/mnt")


@dataclass(frozen=True)
class Machine:
    """All of the machine's own that a lab could leave something in. Other labs may run at the same time."""

    mounts: frozenset[str]
    links: str
    addresses: str
    routes: str
    rules: str


@dataclass(frozen=True)
class Belongings:
    """What is a lab's own: found by its name, or while it ran."""

    id: str
    namespaces: frozenset[str]
    processes: frozenset[int]

    def left(self, ended: float = float("inf")) -> list[str]:
        """What is there still.

        :param ended: seconds since boot. Numbers of namespaces and processes come again: what began later is not ours.
        """
        patterns = (
            cgroups.root().glob(f"**/{state.PREFIX}{self.id}*"),
            state.base().glob(f"{state.PREFIX}{self.id}*"),
        )
        found = [str(path) for paths in patterns for path in paths]
        for process in Path("/proc").glob("[0-9]*"):
            if began(process) <= ended:
                found += [name for name in namespaces_of([process]) if name in self.namespaces]
                found += [process.name] if int(process.name) in self.processes else []
        return found


def began(process: Path) -> float:
    """Seconds since boot; never, for a process that is gone."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def look() -> Machine:
    def ip(*arguments: str) -> str:
        lines = subprocess.check_output(["/usr/sbin/ip", *arguments], text=True).splitlines()
        # A cluster has one link here, and may come and go meanwhile.
        return "\n".join(line for line in lines if LINK not in line)

    return Machine(
        mounts=frozenset(
            line
            for line in Path("/proc/self/mounts").read_text().splitlines()
            if line.split()[1] in PLACES or state.PREFIX in line
        ),
        links=ip("-o", "-br", "link"),
        addresses=ip("-o", "-br", "address"),
        routes=ip("route", "show", "table", "all"),
        rules=ip("rule"),
    )


def belongings(name: str) -> Belongings:
    numbers = cgroups.processes(cgroups.root() / f"{state.PREFIX}{name}")
    own = frozenset(namespaces_of([Path("/proc/self")]))
    namespaces = frozenset(namespaces_of(Path(f"/proc/{number}") for number in numbers)) - own
    # Fabric, control, two nodes with mounts of their own, and two pods.
    assert len(namespaces) == 4 + 2 + 2
    return Belongings(name, namespaces, frozenset(numbers))


def namespaces_of(processes: Iterable[Path]) -> Iterator[str]:
    for process in processes:
        for kind in ("net", "mnt"):
            try:
                yield os.readlink(process / f"ns/{kind}")
            except OSError:
                continue


def nothing_is_left(before: Machine, lab: Belongings | None = None, patience: float = 3.0) -> None:
    """The kernel frees namespaces a moment after their last process, and init reaps orphans when it gets to it."""
    ended = time.clock_gettime(time.CLOCK_BOOTTIME)
    deadline = time.monotonic() + patience
    while (look() != before or (lab and lab.left(ended))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert look() == before
    assert lab is None or lab.left(ended) == []


@pytest.fixture
def running() -> Iterator[tuple[Machine, subprocess.Popen[str], Belongings]]:
    """The machine as it was before, and a process with a lab."""
    for stale in state.reap_stale():
        print(f"there was a stale lab {stale.id}")
    before = look()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert (state.base() / f"{state.PREFIX}{line}").is_dir(), line + process.stdout.read()
        yield before, process, belongings(line)
        process.kill()
    state.reap_stale()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_after_a_signal(
    running: tuple[Machine, subprocess.Popen[str], Belongings], number: signal.Signals
):
    before, process, lab = running
    process.send_signal(number)
    assert process.wait(10) != 0
    nothing_is_left(before, lab)


def test_nothing_is_left_after_an_exception():
    state.reap_stale()
    before = look()

    def fail() -> None:
        with Lab(nodes=1, mesh=False) as lab:
            lab.pod("pod")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    nothing_is_left(before)


@pytest.mark.parametrize("how", ["clean", "next start"])
def test_nothing_is_left_after_kill_9_and_what_comes_next(
    running: tuple[Machine, subprocess.Popen[str], Belongings], how: str
):
    before, process, lab = running
    process.kill()
    process.wait()
    # The lab lives on without its owner ...
    assert len(lab.left()) > len(lab.processes)
    assert lab.id in {found.id for found in state.labs() if found.stale}
    # ... until somebody looks.
    if how == "clean":
        done = subprocess.run(
            [sys.executable, "-m", "lab", "clean"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=30,
            check=True,
        )
        assert f"removed lab {lab.id}" in done.stdout
    else:
        with Lab(nodes=1, mesh=False):
            assert lab.id not in {found.id for found in state.labs()}
    nothing_is_left(before, lab)


def test_a_lab_in_use_is_not_reaped(running: tuple[Machine, subprocess.Popen[str], Belongings]):
    _, process, lab = running
    assert lab.id not in {reaped.id for reaped in state.reap_stale()}
    assert process.poll() is None
    assert frozenset(cgroups.processes(cgroups.root() / f"{state.PREFIX}{lab.id}")) >= lab.processes


def test_a_number_that_came_again_is_no_owner():
    mine = state.create()
    try:
        assert not mine.stale
        assert state.State(mine.id, mine.pid, mine.started - 1, mine.boot).stale
        assert state.State(mine.id, mine.pid, mine.started, "another boot").stale
    finally:
        state.reap(mine)
