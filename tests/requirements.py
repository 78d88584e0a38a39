"""What a test needs of the machine, said so that a skip can never hide a test that should have run.

A test calls :func:`require` for what any proper machine has: without it the test is skipped on a workstation and fails
in CI. :func:`cannot_be_had` is for what no machine of this project can have; such skips are allowed in CI too, and the
summary lists them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

#: The checkout.
ROOT = Path(__file__).resolve().parents[1]
#: Read-only data beside the checkout: conformance cases and seed configuration.
SHARED = Path(os.environ.get("MYCEL_SHARED") or ROOT.parent / "shared")
#: The real Envoy of the environment. Run by this path, it starts without a Python interpreter in front of it.
ENVOY = next(
    iter(sorted((ROOT / ".venv/lib").glob("python3*/site-packages/envoy/_bin/envoy"))), Path("envoy")
)

CI = os.environ.get("MYCEL_CI") == "1"
#: Whether tests that have a longer form (marked ``soak``) run in it.
SOAK = os.environ.get("MYCEL_SOAK") == "1"
ALLOWED_SKIP_PREFIX = "cannot-be-had: "


def require(present: object, what: str) -> None:
    """Skip the test (in CI: fail it) unless ``present`` is true. ``what`` names the need: "root", "a BTF of the kernel"."""
    __tracebackhide__ = True
    if not present:
        pytest.skip(f"needs {what}")


def require_program(name: str) -> str:
    """The path of a program that ``scripts/setup`` installs."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")
    require(path, f"the program {name}")
    assert path is not None
    return path


def require_root() -> None:
    """Root on a kernel with the unified cgroup hierarchy and bpffs: what namespaces and eBPF need."""
    require(os.geteuid() == 0, "root")
    mounts = Path("/proc/mounts").read_text()
    require(" cgroup2 " in mounts, "a mounted cgroup v2 hierarchy")
    require("bpf" in Path("/proc/filesystems").read_text().split(), "a kernel with bpffs")


def cannot_be_had(why: str) -> NoReturn:
    """Skip the test, in CI as well: no machine of this project has what it needs."""
    __tracebackhide__ = True
    pytest.skip(ALLOWED_SKIP_PREFIX + why)
