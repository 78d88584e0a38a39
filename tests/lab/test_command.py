"""``python -m lab``: what a developer does by hand."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.requirements import ROOT

pytestmark = pytest.mark.privileged

LAB = [sys.executable, "-m", "lab"]


def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAB, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=check,
        stdin=subprocess.DEVNULL,
    )


def test_up_exec_list_and_an_end_by_ctrl_c():
    with subprocess.Popen(
        [*LAB, "up", "--no-mesh"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        try:
            name = process.stdout.readline().split()[1].rstrip(":")
            places = process.stdout.readline()
            assert all(place in places for place in ("client", "web-app-v1", "node2", "control"))
            assert name in run("list").stdout
            done = run("exec", "--lab", name, "client", "ip", "-o", "-4", "address", "show", "eth0")
            assert "10.244.1." in done.stdout
            wrong = run("exec", "--lab", name, "nowhere", "true", check=False)
            assert wrong.returncode == 1
            assert "no place nowhere" in wrong.stderr
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
            assert name not in run("list").stdout
        finally:
            process.kill()
