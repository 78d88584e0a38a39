"""Puts the plugin into a CNI binary folder, and takes it out: ``python -m cni.install BIN-DIR [--bundle DIR]``.

Owns how the plugin's interpreter is started and where its files lie; the node's configuration lists are not touched here.
Two forms:

- from a **bundle** (``--bundle``; the agent's image has it): interpreter, libraries and loader go to ``BIN-DIR/.mycel/HASH/``,
  named by what is in them, and nothing of the host is used but its kernel. An older one stays until nobody can still be
  starting it.
- without: a launcher for the interpreter that runs this, for machines of developers and tests.

Either way everything is there whole before the launcher, the file that a runtime starts, is renamed into its place.
``-I -S -E`` leave out site, the user's folder and PYTHON* variables: nothing in a runtime's environment can change what runs, and
start-up takes half the time.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import marshal
import os
import shutil
import sys
import time
from pathlib import Path

NAME = "mycel"
#: In the binary folder: bundles by hash, and beside an outdated one a file that says so since its mtime.
BUNDLES = ".mycel"
_OUTDATED = ".outdated"
#: Seconds for which an outdated bundle stays: longer than a runtime takes from reading the launcher to the end of the plugin
#: (whose timeout is at most 60 s).
KEEP = 300.0
#: The plugin's modules, in the bundle's library.
_MODULES = ("__init__", "fastjson", "plugin", "protocol")

_LAUNCHER = """\
#!{interpreter} -ISE
import sys

sys.path.insert(0, {packages!r})
from cni.plugin import main

main()
"""

# The shell is only there because a #! line takes one argument. -B: nothing is written to the host.
_BUNDLED = """\
#!{bundle}/busybox sh
unset LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT
exec {bundle}/lib/ld.so --inhibit-cache --library-path {bundle}/lib {bundle}/bin/python3.11 -ISEB \
-c 'from cni.plugin import main; main()'
"""


class InstallError(Exception):
    """The plugin could not be put in place; what was there before still is."""


def launcher(interpreter: str, packages: str) -> str:
    """The launcher's text. ``packages`` is the folder that holds the package ``cni``.

    :raises ValueError: the interpreter's path cannot stand in a ``#!`` line (execve(2): 127 bytes, no white space).
    """
    line = f"#!{interpreter} -ISE"
    if (
        len(os.fsencode(line)) > 127
        or any(c.isspace() for c in interpreter)
        or not interpreter.startswith("/")
    ):
        raise ValueError(f"interpreter: {interpreter!r} cannot stand in a #! line")
    return _LAUNCHER.format(interpreter=interpreter, packages=packages)


def bundled_launcher(bundle: str) -> str:
    """The launcher of a bundle that the host sees at ``bundle``.

    :raises ValueError: such a path cannot stand in a ``#!`` line, or means something to a shell.
    """
    plain = all(c.isalnum() or c in "/._-+" for c in bundle) and bundle.isascii()
    if not plain or not bundle.startswith("/") or len(f"#!{bundle}/busybox sh") > 127:
        raise ValueError(f"bundle: {bundle!r} cannot stand in a #! line")
    return _BUNDLED.format(bundle=bundle)


def install(folder: Path, *, name: str = NAME, interpreter: str = "", packages: str = "") -> Path:
    """Write the launcher whole or not at all (a runtime may start it at any moment).

    Defaults: this interpreter, without the virtual environment (the plugin needs the standard library only), and the
    folder that this package was imported from.
    """
    text = launcher(
        interpreter or os.path.realpath(sys.executable),
        packages or str(Path(__file__).resolve().parent.parent),
    )
    _write(folder / name, text)
    return folder / name


def install_bundle(folder: Path, bundle: Path, host_folder: str = "", *, name: str = NAME) -> bool:
    """Bring ``bundle`` and the launcher into force; False if they already were, whole.

    :param host_folder: where the host sees ``folder``; default: at the same path.
    :raises InstallError: it cannot be read or written.
    """
    try:
        files = _contents(bundle)
        key = _hash(files)
        target = folder / BUNDLES / key
        text = bundled_launcher(f"{host_folder or folder}/{BUNDLES}/{key}")
        changed = False
        if _present(target) != files:
            _copy(files, target)
            changed = True
        (target.parent / f"{key}{_OUTDATED}").unlink(missing_ok=True)
        if _read(folder / name) != text.encode() or not os.access(folder / name, os.X_OK):
            _write(folder / name, text)
            changed = True
        for other in target.parent.iterdir():
            if other.is_dir() and other.name != key:
                mark = other.with_name(f"{other.name}{_OUTDATED}")
                if not mark.exists():
                    mark.touch()
    except OSError as error:
        raise InstallError(f"{error.filename}: {error.strerror}") from None
    return changed


def collect(folder: Path, *, keep: float = KEEP, proc: Path = Path("/proc")) -> list[str]:
    """Remove the bundles that have been outdated for ``keep`` seconds and that no process runs; gives their names."""
    removed = []
    used = None
    for mark in sorted((folder / BUNDLES).glob(f"*{_OUTDATED}")):
        if time.time() - mark.stat().st_mtime < keep:
            continue
        bundle = mark.with_name(mark.name.removesuffix(_OUTDATED))
        if used is None:
            used = _running(proc)
        if any(_identity(path) in used for path in _programs(bundle)):
            continue
        shutil.rmtree(bundle, ignore_errors=True)
        if not bundle.exists():
            mark.unlink(missing_ok=True)
            removed.append(bundle.name)
    return removed


def remove(folder: Path, *, name: str = NAME) -> None:
    """Take out everything of ours: the launcher first, so that none is left without what it starts.

    :raises InstallError: something cannot be removed.
    """
    try:
        (folder / name).unlink(missing_ok=True)
        if (folder / BUNDLES).exists():
            shutil.rmtree(folder / BUNDLES)
        for aside in folder.glob(f".{name}.[0-9]*"):
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise InstallError(f"{error.filename}: {error.strerror}") from None


def _contents(bundle: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and content of every file, by its path in the bundle: what the image has, and the plugin's own modules."""
    files = _present(bundle)
    if not {"busybox", "bin/python3.11", "lib/ld.so"} <= files.keys():
        raise InstallError(f"{bundle}: no bundle of the plugin's interpreter")
    for module in _MODULES:
        source = Path(__file__).with_name(f"{module}.py")
        files[f"lib/python3.11/cni/{module}.pyc"] = (0o644, _compiled(source))
    return files


def _compiled(source: Path) -> bytes:
    """Byte code (PEP 552, unchecked) whose bytes depend on the source alone: version 2 of the format has no references."""
    text = source.read_bytes()
    code = compile(text, f"cni/{source.name}", "exec", dont_inherit=True, optimize=0)
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(text)
    return header + marshal.dumps(code, 2)


def _present(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mode & 0o777, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _hash(files: dict[str, tuple[int, bytes]]) -> str:
    total = hashlib.sha256()
    for path, (mode, data) in sorted(files.items()):
        total.update(f"{path}\0{mode:o}\0{hashlib.sha256(data).hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def _copy(files: dict[str, tuple[int, bytes]], target: Path) -> None:
    """Make ``target`` hold ``files``; one that was damaged goes, and is there again a moment later."""
    target.parent.mkdir(mode=0o755, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for path, (mode, data) in files.items():
            file = aside / path
            file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with file.open("wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            file.chmod(mode)
        if target.exists():
            damaged = target.with_name(f".{target.name}.damaged.{os.getpid()}")
            target.rename(damaged)
            aside.rename(target)
            shutil.rmtree(damaged, ignore_errors=True)
        else:
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(target: Path, text: str) -> None:
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        aside.write_text(text)
        aside.chmod(0o755)
        aside.rename(target)
    finally:
        aside.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _programs(bundle: Path) -> list[Path]:
    return [bundle / "busybox", bundle / "lib/ld.so", bundle / "bin/python3.11"]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _running(proc: Path) -> set[tuple[int, int] | None]:
    """The programs that processes run now, by device and inode: their paths differ from one mount namespace to another."""
    return {_identity(process / "exe") for process in proc.glob("[0-9]*")} - {None}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cni.install", description="Put the CNI plugin in place.")
    parser.add_argument("folder", type=Path, help="the runtime's folder of CNI plugins")
    parser.add_argument(
        "--name", default=NAME, help="the file's name, which is the type in the configuration"
    )
    parser.add_argument("--interpreter", default="", help="default: the one that runs this")
    parser.add_argument("--bundle", type=Path, help="interpreter and libraries that the plugin brings along")
    parser.add_argument("--host-folder", default="", help="where the host sees FOLDER, if elsewhere")
    parser.add_argument("--remove", action="store_true", help="take everything of ours out")
    options = parser.parse_args()
    try:
        if options.remove:
            remove(options.folder, name=options.name)
            print(json.dumps({"removed": True}))
        elif options.bundle is not None:
            changed = install_bundle(options.folder, options.bundle, options.host_folder, name=options.name)
            print(json.dumps({"changed": changed, "collected": collect(options.folder)}))
        else:
            print(install(options.folder, name=options.name, interpreter=options.interpreter))
    except (InstallError, ValueError) as error:
        sys.exit(f"cni.install: {error}")


if __name__ == "__main__":
    main()
