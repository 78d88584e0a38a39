"""An agent that is not replaced takes the mesh off its node: nothing of ours stays, and pods go on as without a mesh."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab import Lab, Talker
from lab.node import python_module
from tests.mesh.helpers import ECHO, echo_server, echoes

pytestmark = pytest.mark.privileged


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_a_node_without_a_mesh_again():
    with Lab(nodes=1) as lab:
        lab.namespace("default")
        server = echo_server(lab, "server")
        server.serve(server.app("tcp_server", ECHO + 1), ECHO + 1)
        client = lab.pod("client")
        lab.settle()
        node = lab.node("node1")
        pins = node.root / "sys/fs/bpf/mycel"
        assert echoes(client, server.address, ECHO) == ""
        assert "lookup 28025" in server.run(["ip", "rule"]).stdout.replace("0x6d79", "28025")
        with Talker(client) as talker:
            assert talker.open(server.address, ECHO + 1).ok
            command = [*python_module("agent"), "--leave"]
            refused = node.run(command, check=False, timeout=60)
            assert refused.returncode == 1
            assert "another agent runs" in refused.stdout
            assert files(pins)

            for component in ("agent", "nodeproxy", "l7proxy"):
                lab.stop("node1", component)
            assert files(pins)  # an end is an upgrade
            done = node.run(command, timeout=60)
            assert "error" not in done.stdout
            assert talker.exchange().ok
        for folder in ("sys/fs/bpf/mycel", "run/mycel", "var/lib/mycel"):
            assert files(node.root / folder) == [], folder
        assert not pins.exists()
        for pod in (server, client):
            assert len(pod.run(["ip", "rule"]).stdout.splitlines()) == 3
            assert pod.run(["ip", "route", "show", "table", "28025"], check=False).stdout == ""
            assert pod.run(["cat", "/proc/sys/net/ipv4/tcp_fwmark_accept"]).stdout.strip() == "0"
        assert echoes(client, server.address, ECHO) == ""
