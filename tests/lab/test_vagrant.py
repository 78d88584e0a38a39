"""The virtual machines' description is valid, and what only they run fits what the cluster lab tests every day."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.requirements import ROOT, require_program

VAGRANT = ROOT / "vagrant"
PROVISION = VAGRANT / "provision"


@pytest.mark.timeout(300)
def test_the_vagrantfile_is_valid(tmp_path: Path):
    environment = {
        **os.environ,
        "VAGRANT_HOME": str(tmp_path / "home"),
        "VAGRANT_DOTFILE_PATH": str(tmp_path / "state"),
        "VAGRANT_CHECKPOINT_DISABLE": "1",
    }
    done = subprocess.run(
        [require_program("vagrant"), "validate", "--ignore-provider"],
        cwd=VAGRANT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validated successfully" in done.stdout
    # It speaks of both machines.
    assert "node1" in done.stdout and "node2" in done.stdout


@pytest.mark.parametrize("script", ["control-plane", "machine", "node", "pki", "units", "certificates"])
def test_scripts_parse(script: str):
    subprocess.run(["bash", "-n", PROVISION / script], check=True)


def test_a_unit_for_each_daemon(tmp_path: Path):
    """As ``machine`` calls them, with a folder in place of the machine's root."""
    programs, control = tmp_path / "programs", tmp_path / "control"
    programs.mkdir()
    for plugin in ("bridge", "host-local", "loopback", "portmap", "ptp"):
        (programs / plugin).write_text("")
    pki = control / "pki"
    run("pki", pki, "192.168.56.11", "node1=192.168.56.11", "node2=192.168.56.12")
    run("control-plane", control, programs, "192.168.56.11")
    root = tmp_path / "root"
    run("node", root, programs, pki / "nodes/node2", "node2", "192.168.56.12", 2, "zone-2")
    run("units", root, "/etc/kubernetes/services")
    units = {path.stem: path.read_text() for path in (root / "etc/systemd/system").glob("*.service")}
    assert set(units) == {"containerd", "kubelet", "kube-proxy"}
    for name, text in units.items():
        program = f"/etc/kubernetes/services/{name}"
        assert f"ExecStart={program}\n" in text
        assert os.access(root / program.lstrip("/"), os.X_OK)
        assert "KillMode=process\n" in text
    parts = {path.name for path in (control / "services").iterdir()}
    assert parts == {"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"}
    # The second node has no key but its own.
    keys = {path.name for path in (root / "etc/kubernetes").rglob("*.key")}
    assert keys == {"kubelet.key"}


def run(script: str, *arguments: object) -> None:
    subprocess.run([PROVISION / script, *map(str, arguments)], check=True)
