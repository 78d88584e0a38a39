"""The bootstrap that the command writes: a real Envoy takes it, and nobody but its owner reads it."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bench import envoy
from cli.main import app


def write(folder: Path, controller: str) -> tuple[Result, Path]:
    envoy.make_identities(folder)
    (folder / "credential").write_text("a-token\n")
    output = folder / "envoy.json"
    arguments = ["envoy-bootstrap", "--node", "node1", "--controller", controller, "--output", str(output)]
    arguments += ["--roots", str(folder / "roots.pem"), "--credential", str(folder / "credential")]
    return CliRunner().invoke(app, arguments), output


@pytest.mark.parametrize(
    ("controller", "kind"),
    [
        ("10.99.0.1:15012", "STATIC"),
        ("[fd00::1]:15012", "STATIC"),
        ("mycel.mycel-system.svc:15012", "STRICT_DNS"),
    ],
)
def test_envoy_takes_it(tmp_path: Path, controller: str, kind: str) -> None:
    result, output = write(tmp_path, controller)
    assert result.exit_code == 0, result.output
    made = json.loads(output.read_text())
    assert made["static_resources"]["clusters"][0]["type"] == kind
    metadata = made["dynamic_resources"]["ads_config"]["grpc_services"][0]["initial_metadata"]
    assert metadata == [{"key": "authorization", "value": "Bearer a-token"}]
    done = subprocess.run(
        [*envoy.command(output), "--mode", "validate"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_credential_stays_with_its_owner(tmp_path: Path) -> None:
    _, output = write(tmp_path, "10.99.0.1:15012")
    assert stat.S_IMODE(output.stat().st_mode) == 0o600


@pytest.mark.parametrize("controller", ["10.99.0.1", ":15012", "host:port", "host:0", "host:70000"])
def test_an_address_that_is_none_is_named(tmp_path: Path, controller: str) -> None:
    result, output = write(tmp_path, controller)
    assert result.exit_code == 2
    assert repr(controller) in result.stderr
    assert not output.exists()
