"""A lab with the mesh, killed with kill -9: its kernel programs, pins and processes go with it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import cgroups, state
from tests.programs import CGROUP_INET4_CONNECT, CGROUP_SOCK_OPS, SK_LOOKUP, attached, loaded
from tests.requirements import ROOT

pytestmark = pytest.mark.privileged

SCRIPT = """
import time
from lab import Lab
with Lab(nodes=2) as lab:
    lab.namespace("default")
    near, far = lab.pod("near", node="node1"), lab.pod("far", node="node2")
    far.serve(far.app("tcp_server", 9000, "--greet"), 9000)
    lab.settle()
    assert "ok" in near.run(near.app("traffic", far.address, 9000, "--count", 1, "--greeted"), timeout=20).stdout
    print(lab.id, near.net, flush=True)
    time.sleep(1000)
"""


def test_programs_go_with_the_lab_after_kill_9():
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert len(line.split()) == 2, line + process.stdout.read()
            name, namespace = line.split()
            top = cgroups.root() / f"{state.PREFIX}{name}"
            programs = {
                number
                for node in ("node1", "node2")
                for kind in (CGROUP_SOCK_OPS, CGROUP_INET4_CONNECT)
                for number in attached(top / node, kind)
            }
            programs |= set(attached(Path(namespace), SK_LOOKUP))
            assert len(programs) == 5
            assert all(loaded(number) for number in programs)
        finally:
            process.kill()
    subprocess.run([sys.executable, "-m", "lab", "clean"], cwd=ROOT, timeout=30, check=True)
    deadline = time.monotonic() + 5
    while any(loaded(number) for number in programs) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [number for number in programs if loaded(number)] == []
    assert not top.exists()
    assert not (state.base() / f"{state.PREFIX}{name}").exists()
