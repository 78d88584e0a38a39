"""Where the programs of Kubernetes are: built once from their Go modules, kept in the cache outside of the checkout."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lab.errors import LabError

BUILD = Path(__file__).with_name("programs") / "build"
#: The scripts that configure control plane and nodes, here and on the virtual machines of ``vagrant/``.
PROVISION = Path(__file__).resolve().parents[2] / "vagrant/provision"
APPS = Path(__file__).resolve().parents[1] / "apps"


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


@functools.cache
def images() -> list[Path]:
    """Archives of the images that every cluster starts with, made from programs of this machine and kept beside them.

    :raises LabError: they cannot be made.
    """
    parts = [PROVISION / "images", *sorted(APPS.glob("*.py"))]
    key = hashlib.sha256(b"".join(part.read_bytes() for part in parts))
    for program in ("/usr/bin/python3", "/bin/busybox", "/usr/bin/curl"):
        status = os.stat(program)
        key.update(f"{program} {status.st_mtime_ns} {status.st_size}".encode())
    made = folder() / f"images-{key.hexdigest()[:16]}"
    if not made.is_dir():
        temporary = Path(tempfile.mkdtemp(prefix=".images-", dir=folder()))
        try:
            configure("images", folder(), temporary)
            for old in folder().glob("images-*"):
                shutil.rmtree(old, ignore_errors=True)
            temporary.rename(made)
        except OSError:
            if not made.is_dir():  # somebody else was quicker
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return sorted(made.glob("*.tar"))


def configure(script: str, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
    """Run one of the provisioning scripts.

    :raises LabError: it failed, with what it wrote.
    """
    command = [str(PROVISION / script), *map(str, arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)} ended with status {done.returncode}: {done.stdout.strip()}")
