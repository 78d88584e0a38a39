"""Where the programs of Kubernetes are: built once from their Go modules, kept in the cache outside of the checkout."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

from lab.errors import LabError

BUILD = Path(__file__).with_name("programs") / "build"
#: The scripts that configure control plane and nodes, here and on the virtual machines of ``vagrant/``.
PROVISION = Path(__file__).resolve().parents[2] / "vagrant/provision"


@functools.cache
def folder() -> Path:
    """The folder of all programs; builds what is missing (some ten minutes on a fresh machine), and says so on stderr.

    :raises LabError: they cannot be built. ``$MYCEL_KUBERNETES_PROGRAMS`` names a folder of somebody's own instead.
    """
    if given := os.environ.get("MYCEL_KUBERNETES_PROGRAMS"):
        return Path(given)
    done = subprocess.run([BUILD], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise LabError(
            f"{BUILD} ended with status {done.returncode}: the programs of Kubernetes are not there"
        )
    return Path(done.stdout.strip())


def configure(script: str, *arguments: object) -> None:
    """Run one of the provisioning scripts.

    :raises LabError: it failed, with what it wrote.
    """
    command = [str(PROVISION / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)} ended with status {done.returncode}: {done.stdout.strip()}")
