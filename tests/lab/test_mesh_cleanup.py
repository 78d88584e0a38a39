"""A lab with the mesh, killed with kill -9: its kernel programs, pins and processes go with it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import cgroups, state
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

#: enum bpf_attach_type (linux/bpf.h).
CGROUP_SOCK_OPS, CGROUP_INET4_CONNECT, SK_LOOKUP = 3, 10, 36


def attached(path: Path, kind: int) -> list[int]:
    """Ids of the programs that are attached to a cgroup or a network namespace."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    ids = (ctypes.c_uint32 * 16)()
    count = ctypes.c_uint32(16)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert libbpf.bpf_prog_query(fd, kind, 0, None, ids, ctypes.byref(count)) == 0, os.strerror(
            ctypes.get_errno()
        )
    finally:
        os.close(fd)
    return list(ids[: count.value])


def loaded(number: int) -> bool:
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    fd = libbpf.bpf_prog_get_fd_by_id(number)
    if fd >= 0:
        os.close(fd)
    return bool(fd >= 0)


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
