"""Row ``install``: from ``mycel install`` on a running two-node cluster, with the images there, until ``mycel check`` passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from lab.errors import LabError
from lab.kubernetes import Cluster
from lab.kubernetes.mesh import Mesh

ROWS = ("install",)

#: Seconds after which it is a failure.
_GIVE_UP = 120


class InstallError(Exception):
    """The figure could not be measured."""


def measure(*, say: Callable[[str], None], rounds: int = 3) -> dict[str, Any]:
    """``install_seconds`` and each round's. Between two rounds ``mycel uninstall`` makes the cluster what it was.

    :raises InstallError: with what went wrong.
    """
    found: list[float] = []
    try:
        with Cluster("bench-install") as cluster:
            mesh = Mesh(cluster)
            mesh.load_images()
            for number in range(rounds):
                began = time.monotonic()
                text = mesh.mycel("install")
                cluster.kubectl("apply", "--server-side", "-f", "-", input=text, timeout=120)
                mesh.mycel("check", "--wait", f"{_GIVE_UP}s", timeout=_GIVE_UP + 30)
                found.append(time.monotonic() - began)
                say(f"install {number + 1}/{rounds}: {found[-1]:.1f} s")
                mesh.mycel("uninstall", "--yes", timeout=300)
    except LabError as error:
        raise InstallError(str(error)) from error
    return {
        "install_seconds": round(median(found), 1),
        "install_rounds": [round(seconds, 1) for seconds in found],
    }
