"""A real container runtime on a node of the lab: podman with runc, and libcni under it.

Its storage and state are the node's own (``/var/lib``, ``/run``), its cgroups the lab's. Images are made from programs of
this machine: there is no registry.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lab.node import Node

#: The only program in the image, with its libraries. ``/dev/tcp`` makes it a client.
SHELL = Path("/bin/bash")
IMAGE = "localhost/lab/shell:1"


class Podman:
    """:param cgroup_parent: absolute within each hierarchy; the lab's own, so that the lab removes it."""

    def __init__(self, node: Node, cgroup_parent: str) -> None:
        self._node = node
        self._cgroup_parent = cgroup_parent
        self._folder = node.folder / "podman"
        self._folder.mkdir()
        configuration = self._folder / "containers.conf"
        configuration.write_text(
            f'[network]\nnetwork_backend = "cni"\ncni_plugin_dirs = ["{node.cni_binaries}"]\n'
            'network_config_dir = "/etc/cni/net.d"\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
        )
        self._command = [
            *("/usr/bin/env", f"CONTAINERS_CONF={configuration}", "/usr/bin/podman", "--log-level", "warn"),
            *("--root", "/var/lib/containers", "--runroot", "/run/containers", "--tmpdir", "/run/libpod"),
            *("--storage-driver", "vfs", "--runtime", "runc"),
        ]

    def make_image(self) -> None:
        root = self._folder / "image"
        libraries = [
            line.split("=>")[-1].split()[0]
            for line in subprocess.check_output(["/usr/bin/ldd", SHELL], text=True).splitlines()
            if "/" in line
        ]
        for file in (str(SHELL), *libraries):
            target = root / file.removeprefix("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        archive = self._folder / "image.tar"
        subprocess.run(["/usr/bin/tar", "-C", root, "-cf", archive, "."], check=True)
        self._node.run([*self._command, "import", str(archive), IMAGE], timeout=60)

    def run(
        self,
        script: str,
        *,
        name: str,
        network: str = "pods",
        options: Sequence[str] = (),
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """``podman run --rm`` of a bash script on the node's network. :raises CommandError: it failed, with ``check``."""
        return self._node.run(
            [
                *self._command,
                *(
                    "run",
                    "--rm",
                    "--name",
                    name,
                    "--network",
                    network,
                    "--cgroup-parent",
                    self._cgroup_parent,
                ),
                # The limits that podman takes by default may be above what this process is allowed.
                *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"),
                *options,
                *(IMAGE, str(SHELL), "-c", script),
            ],
            timeout=60,
            check=check,
        )
