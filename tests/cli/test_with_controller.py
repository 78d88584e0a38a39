"""The commands against a controller that really runs: what it serves is what they read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.peers.controller import running

MISSING_SUBSET = """
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  clusterIP: 10.96.0.10
  selector: {app: web}
  ports: [{name: http, port: 80}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: default}
spec:
  hosts: [web]
  http: [{route: [{destination: {host: web, subset: v1}}]}]
"""


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[str]:
    """The admin address of a controller whose folder is ``tmp_path/config``."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "web.yaml").write_text(MISSING_SUBSET)
    with running(tmp_path) as controller:
        yield controller.admin


def test_check_reads_the_controllers_findings_and_misses_the_nodes(controller: str) -> None:
    result = CliRunner().invoke(app, ["check", "--controller", controller, "--json"])
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    (subset,) = [f for f in found if f["object"] == "VirtualService default/web"]
    assert "v1" in subset["message"]
    assert subset["action"]
    assert subset["file"] == "web.yaml"
    assert any(f["message"] == "no node is connected to the controller" for f in found)


def test_offline_says_the_same_of_the_same_folder(controller: str, tmp_path: Path) -> None:
    online = CliRunner().invoke(app, ["check", "--controller", controller, "--json"])
    offline = CliRunner().invoke(app, ["check", "--config", str(tmp_path / "config"), "--json"])
    of_objects = [[f for f in json.loads(r.stdout) if f["object"] != "Mesh"] for r in (online, offline)]
    assert of_objects[0] == of_objects[1] != []


def test_stat_says_that_nobody_measures_yet(controller: str) -> None:
    result = CliRunner().invoke(app, ["stat", "--controller", controller])
    assert result.exit_code == 2
    assert "nothing is measured yet" in result.stderr
