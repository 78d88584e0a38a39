"""Streams whose every byte is checked at both ends (programs/streams.c), while connections enter and leave all the time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from pathlib import Path

import pytest

from agent.kernel import Direction
from bpf.wire import SpliceCounter
from tests.kernel.mesh import TestPod
from tests.requirements import SOAK, require_program

pytestmark = pytest.mark.privileged

RESETS, MAPPED, LONG = 1, 2, 4
SOURCE = Path(__file__).parent / "programs/streams.c"
PORT = 8080


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = require_program("gcc")
    program = tmp_path_factory.mktemp("streams") / "streams"
    done = subprocess.run(
        [compiler, "-O2", "-o", str(program), str(SOURCE), "-lpthread"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return program


def start(pod: TestPod, *command: object) -> subprocess.Popen[str]:
    procs = pod.node.cgroup("app") / "cgroup.procs"
    script = f'echo $$ >{procs}; exec nsenter --net=/proc/self/fd/{pod.netns} -- "$@"'
    return subprocess.Popen(
        ["sh", "-c", script, "sh", *map(str, command)],
        pass_fds=(pod.netns,),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def walking(splices, every):
    """As the agent does, but more often: so that short connections are in the splice too."""
    stop = threading.Event()

    def walk():
        while not stop.wait(every):
            splices.walk()

    thread = threading.Thread(target=walk)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("flags", "connections"),
    [
        (0, 1_000_000 if SOAK else 85_000),
        (RESETS, 100_000 if SOAK else 10_000),
        (LONG, 20_000 if SOAK else 1500),
        (MAPPED, 50_000 if SOAK else 5000),
    ],
    ids=["orderly", "resets", "long", "mapped"],
)
def test_no_byte_is_lost_or_overtaken(node, make_pod, streams, flags, connections):
    """Instant first bytes, by both ends; random sizes, readers and ends of connections; slow readers, which overflow."""
    client, server = make_pod(), make_pod()
    client.enrol({})
    server.enrol({(client.identity, 0): True})
    before = node.kernel.splices.counters()
    seed = time.time_ns() % 1_000_000_007
    serving = start(server, streams, "serve", "0.0.0.0", PORT, 32, seed, flags & ~MAPPED)
    try:
        assert serving.stdout is not None
        assert serving.stdout.readline() == "ready\n", serving.communicate(timeout=10)[1]
        with walking(node.kernel.splices, 0.003):
            dialling = start(client, streams, "dial", server.address, PORT, 32, seed, flags, connections)
            try:
                out, errors = dialling.communicate(timeout=1400)
            finally:
                dialling.kill()
            assert dialling.returncode == 0, f"seed {seed}: {errors}"
            deadline = time.monotonic() + 5
            while node.kernel.splices.walk() != (0, 0, 0) and time.monotonic() < deadline:
                time.sleep(0.05)
            # Each of its connections comes to its end first: one that is never woken says so, after 30 s.
            serving.terminate()
            served, errors = serving.communicate(timeout=60)
        assert serving.returncode == 0, f"seed {seed}: {errors}"
    finally:
        serving.kill()
        serving.wait()
    dialled, served = json.loads(out), json.loads(served)
    assert (dialled["good"], dialled["bad"], served["bad"]) == (connections, 0, 0)
    happened = {slot: count - before[slot] for slot, count in node.kernel.splices.counters().items()}
    # They were in it, and out of it again.
    assert happened[SpliceCounter.ENTERED] > connections / 20, happened
    assert happened[SpliceCounter.LEFT] > 0 and happened[SpliceCounter.OVERFLOWS] > 0, happened
    # The kernel may still be about to close what the programs have left.
    deadline = time.monotonic() + 5
    while used := node.kernel.pressure()["splices"].used:
        assert time.monotonic() < deadline, f"{used} connections are left behind"
        time.sleep(0.02)
    # What goes past TCP is counted to the byte.
    deadline = time.monotonic() + 3
    while True:
        flows = {
            k.direction: f
            for k, f in node.kernel.flows().items()
            if k.source == client.identity and not k.verdict
        }
        if all(flow.closed == connections for flow in flows.values()) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    out_, in_ = flows[Direction.OUTBOUND], flows[Direction.INBOUND]
    # Also what is read when the connection has ended already, while it ends, or never.
    assert (out_.received, in_.received) == (dialled["read"], served["read"])
    if flags & RESETS:
        return
    assert (dialled["sent"], dialled["read"]) == (served["read"], served["sent"])
    assert (out_.opened, out_.closed, out_.sent, out_.received) == (
        connections,
        connections,
        dialled["sent"],
        dialled["read"],
    )
    assert (in_.opened, in_.closed, in_.sent, in_.received) == (
        connections,
        connections,
        served["sent"],
        served["read"],
    )
