"""Python in the images: the locked packages, this project's wheel, and byte code that is the same in every build."""

from __future__ import annotations

import importlib.util
import marshal
import os
import subprocess
import sys
import tempfile
import tomllib
import warnings
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import CodeType

from deploy.images.tree import Tree

INTERPRETER = "/usr/bin/python3.11"
#: On the path of Debian's interpreter, before its own packages.
PACKAGES = "usr/local/lib/python3.11/dist-packages"
#: What uv calls the platforms, by Debian's architecture.
_PLATFORM = {
    "amd64": "x86_64-unknown-linux-gnu",
    "arm64": "aarch64-unknown-linux-gnu",
    "ppc64el": "powerpc64le-unknown-linux-gnu",
    "riscv64": "riscv64-unknown-linux-gnu",
    "s390x": "s390x-unknown-linux-gnu",
}
#: Of no use at run time: types, sources of extension modules, tests, programs with this machine's paths.
_DROP = [
    f"{PACKAGES}/bin", f"{PACKAGES}/.lock", "*.pyi", "*.pyx", "*.pxd", "*.c", "*.h", "*/tests", "*/py.typed", "*/__pycache__",
    "*.dist-info/RECORD", "*.dist-info/INSTALLER", "*.dist-info/REQUESTED", "*.dist-info/direct_url.json",
]  # fmt: skip

_SCRIPT = """\
#!{interpreter} -s
import sys

from {module} import {function}

sys.exit({function}())
"""


class PythonError(Exception):
    """A package or the wheel cannot be had."""


@dataclass(frozen=True)
class Distribution:
    name: str
    version: str
    license: str


def compiled(tree: Tree) -> Tree:
    """The byte code of every module in ``tree``, for the places where Python looks for it.

    Unchecked (the source's time is not looked at), and in version 2 of the format, whose bytes do not depend on how often an
    object is referred to while it is written. What does not compile (templates of other versions) is left out, as pip does.
    """
    result = Tree()
    for path, data in tree.files(".py"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of others' code
                code = compile(data, f"/{path}", "exec", dont_inherit=True, optimize=0)
        except (SyntaxError, ValueError):
            continue
        folder, _, name = path.rpartition("/")
        result.add(f"{folder}/__pycache__/{name[:-3]}.cpython-311.pyc", byte_code(data, code))
    return result


def byte_code(source: bytes, code: CodeType) -> bytes:
    """A .pyc file (PEP 552, hash-based and unchecked)."""
    if sys.version_info[:2] != (3, 11):
        raise PythonError(f"byte code is for Python 3.11, this is {sys.version.split()[0]}")
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(source)
    return header + marshal.dumps(code, 2)


def dependencies(root: Path, architecture: str, cache: Path) -> tuple[Tree, list[Distribution]]:
    """What requirements.lock names, for ``architecture``, checked by hash.

    :raises PythonError: a package cannot be had, or its bytes are other ones.
    """
    if architecture not in _PLATFORM:
        raise PythonError(f"architecture {architecture}: not one of {', '.join(_PLATFORM)}")
    with tempfile.TemporaryDirectory(prefix="mycel-image-") as folder:
        target = Path(folder, "packages")
        _run(
            *(
                _uv(),
                "pip",
                "install",
                "--quiet",
                "--no-config",
                "--no-deps",
                "--require-hashes",
                "--only-binary",
                ":all:",
            ),
            *(
                "--link-mode",
                "copy",
                "--python",
                sys.executable,
                "--python-version",
                "3.11",
                "--python-platform",
            ),
            *(_PLATFORM[architecture], "--target", str(target), "-r", str(root / "requirements.lock")),
            environment={**os.environ, "UV_CACHE_DIR": str(cache / "uv"), "UV_NO_PROGRESS": "1"},
        )
        found = []
        for distribution in metadata.distributions(path=[str(target)]):
            about = distribution.metadata
            licence = about["License-Expression"] or "NOASSERTION"
            found.append(Distribution(about["Name"], distribution.version, licence))
        tree = Tree()
        tree.add_folder(target, PACKAGES)
    tree.drop(_DROP)
    return tree, sorted(found, key=lambda d: d.name.lower())


def project(root: Path, epoch: int) -> Tree:
    """The checkout's wheel, unpacked, and its programs.

    :raises PythonError: the wheel cannot be built.
    """
    with tempfile.TemporaryDirectory(prefix="mycel-image-") as folder:
        _run(
            *(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder),
            environment={**os.environ, "SOURCE_DATE_EPOCH": str(epoch)},
            cwd=root,
        )
        (wheel,) = Path(folder).glob("*.whl")
        tree = Tree()
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if not name.endswith("/"):
                    tree.add(f"{PACKAGES}/{name}", archive.read(name))
    tree.drop(_DROP[:2] + _DROP[-4:])
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    for name, target in scripts.items():
        module, _, function = target.partition(":")
        text = _SCRIPT.format(interpreter=INTERPRETER, module=module, function=function)
        tree.add(f"usr/local/bin/{name}", text, 0o755)
    return tree


def version(root: Path) -> str:
    return str(tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"])


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.exists() else "uv"


def _run(*command: str, environment: dict[str, str], cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(
            command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=900, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PythonError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise PythonError(f"{' '.join(command[:4])} failed: {done.stderr.strip() or done.stdout.strip()}")
