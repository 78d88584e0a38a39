"""Calls the plugin as a runtime does: a process of its own, environment, standard input and output."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cni.install import install
from tests.agent.pods import Netns


@dataclass(frozen=True)
class Called:
    status: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """Standard output, which has to be one JSON object (IO-03)."""
        value = json.loads(self.stdout)
        assert isinstance(value, dict)
        return value

    @property
    def code(self) -> int:
        """The error object's code (IO-01, IO-02); 0 for a success."""
        if self.status == 0:
            return 0
        error = self.result
        assert isinstance(error["cniVersion"], str)
        assert isinstance(error["msg"], str)
        assert error["msg"]
        assert isinstance(error["code"], int)
        assert error["code"] != 0
        # IO-04: 8 to 10 and 12 to 99 (but 50 and 51) are the specification's and have no meaning yet.
        assert error["code"] in {*range(1, 8), 11, 50, 51} or error["code"] >= 100
        return int(error["code"])

    @property
    def text(self) -> str:
        """Message and details of the error."""
        return f"{self.result['msg']} {self.result.get('details', '')}"


class Plugin:
    """The launcher in a folder, and the configuration that calls begin with."""

    def __init__(self, folder: Path, run_dir: Path, **own_keys: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.path = install(folder)
        self.run_dir = run_dir
        self.own_keys = own_keys

    def config(self, version: str = "1.1.0", **more: Any) -> dict[str, Any]:
        own = {"runDir": str(self.run_dir), "timeout": 3, **self.own_keys}
        return {"cniVersion": version, "name": "pods", "type": "mycel", **own, **more}

    def call(
        self,
        command: str | None,
        config: dict[str, Any] | str | None = None,
        *,
        stdin: Any = None,
        **environment: Any,
    ) -> Called:
        """Environment variables with the value None are left out."""
        given = {"CNI_COMMAND": command, "CNI_PATH": "/opt/cni/bin", "PATH": "/usr/bin:/bin", **environment}
        text = config if isinstance(config, str) else json.dumps(self.config() if config is None else config)
        done = subprocess.run(
            [str(self.path)],
            **({"input": text} if stdin is None else {"stdin": stdin}),
            env={name: value for name, value in given.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return Called(done.returncode, done.stdout, done.stderr)


def network(netns: Netns, config: dict[str, Any]) -> dict[str, Any]:
    """Do what the plugins before ours do when their result is prevResult: its addresses are on the pod's interfaces.

    :returns: the configuration.
    """
    given = config.get("prevResult") or {}
    for own in given.get("ips", ()):
        interface = given["interfaces"][own["interface"]]
        name, address = interface["name"], own["address"]
        if "sandbox" in interface and name in netns.interfaces and not netns.has(address, name):
            netns.add_address(address, name)
    return config


def previous(
    address: str = "10.77.0.2/24", version: str = "1.1.0", interface: str = "eth0", **more: Any
) -> dict[str, Any]:
    """A result of the plugins before ours."""
    return {
        "cniVersion": version,
        "interfaces": [
            {"name": "cni0", "mac": "02:00:00:00:00:01"},
            {"name": "veth1", "mac": "02:00:00:00:00:02"},
            {"name": interface, "mac": "02:00:00:00:00:03", "sandbox": "/run/netns/x"},
        ],
        "ips": [{"address": address, "gateway": "10.77.0.1", "interface": 2}],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dns": {},
        **more,
    }
