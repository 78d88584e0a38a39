"""``cnitool`` on a node of the lab: the CNI project's own tool, with network plugins of its time.

The node's chain has Debian's, which are older than version 1.1.0 of the specification. The network here is of that version, so
that GC and STATUS are called too. It is the node's second list, so pods of the lab are not on it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

from lab.kubernetes import programs
from lab.node import PLUGIN, RUN, Node

NETWORK = "tool"


class CniTool:
    """:param subnet: of the network's pods, for this node alone: nobody else has a route to them.

    :raises LabError: the programs of Kubernetes, of which it is one, cannot be built.
    """

    def __init__(self, node: Node, subnet: str, **settings: Any) -> None:
        self._node = node
        self._folder = programs.folder()
        self._list = node.root / f"etc/cni/net.d/20-{NETWORK}.conflist"
        own = {"type": PLUGIN, "runDir": str(RUN), "pinDir": "/sys/fs/bpf/mycel", **settings}
        ipam = {"type": "host-local", "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}]}
        plugins = [{"type": "ptp", "ipam": ipam}, own]
        self._list.write_text(json.dumps({"cniVersion": "1.1.0", "name": NETWORK, "plugins": plugins}))

    def call(
        self, verb: str, netns: str, arguments: Mapping[str, str] | None = None, timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run it.

        :param verb: add, check, del, gc or status.
        :param netns: path of the network namespace, inside of the node.
        :raises CommandError: it failed; the plugin's error is in the message.
        """
        environment = [
            f"CNI_PATH={self._folder}:{self._node.cni_binaries}",
            f"CNI_ARGS={';'.join(f'{key}={value}' for key, value in (arguments or {}).items())}",
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
        ]
        command = ["/usr/bin/env", "-i", *environment, str(self._folder / "cnitool"), verb, NETWORK, netns]
        return self._node.run(command, timeout=timeout)

    def collect(self, *valid: str) -> None:
        """GC by our plugin alone, as a runtime asks: cnitool sends no list of what is valid, which is no empty one.

        :param valid: containers whose interface eth0 stays.
        :raises CommandError: it failed; the plugin's error is in the message.
        """
        listed = [{"containerID": container, "ifname": "eth0"} for container in valid]
        own = json.loads(self._list.read_text())["plugins"][-1]
        config = {**own, "cniVersion": "1.1.0", "name": NETWORK, "cni.dev/valid-attachments": listed}
        environment = ["CNI_COMMAND=GC", f"CNI_PATH={self._node.cni_binaries}"]
        command = ["/usr/bin/env", "-i", *environment, str(self._node.cni_binaries / PLUGIN)]
        self._node.run(command, input=json.dumps(config), timeout=60)

    def forget(self, *containers: str) -> None:
        """Take what libcni noted of containers, as a runtime that lost its state."""
        cache = self._node.root / "var/lib/cni/results"
        for container in containers:
            for note in cache.glob(f"{NETWORK}-{container}-*"):
                note.unlink()

    def noted(self) -> set[str]:
        """The containers of which libcni has a note."""
        cache = self._node.root / "var/lib/cni/results"
        return {json.loads(note.read_text())["containerId"] for note in cache.glob(f"{NETWORK}-*")}

    def leased(self) -> set[str]:
        """The addresses that the network has given out."""
        folder = self._node.root / f"var/lib/cni/networks/{NETWORK}"
        return (
            {file.name for file in folder.iterdir() if file.name[:1].isdigit()} if folder.is_dir() else set()
        )

    def close(self) -> None:
        self._list.unlink(missing_ok=True)
