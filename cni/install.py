"""Writes the plugin's launcher into a CNI binary folder: ``python -m cni.install BIN-DIR [--name mycel]``.

Owns how the plugin's interpreter is started. ``-I -S -E`` leave out site, the user's folder and PYTHON* variables: nothing
in a runtime's environment can change what runs, and start-up takes half the time. Chaining into a node's configuration list
is not done here.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

_LAUNCHER = """\
#!{interpreter} -ISE
import sys

sys.path.insert(0, {packages!r})
from cni.plugin import main

main()
"""


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


def install(folder: Path, *, name: str = "mycel", interpreter: str = "", packages: str = "") -> Path:
    """Write the launcher whole or not at all (a runtime may start it at any moment).

    Defaults: this interpreter, without the virtual environment (the plugin needs the standard library only), and the
    folder that this package was imported from.
    """
    text = launcher(
        interpreter or os.path.realpath(sys.executable),
        packages or str(Path(__file__).resolve().parent.parent),
    )
    target = folder / name
    aside = folder / f".{name}.{os.getpid()}"
    aside.write_text(text)
    aside.chmod(0o755)
    aside.rename(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cni.install", description="Write the CNI plugin's launcher."
    )
    parser.add_argument("folder", type=Path, help="the runtime's folder of CNI plugins")
    parser.add_argument(
        "--name", default="mycel", help="the file's name, which is the type in the configuration"
    )
    parser.add_argument("--interpreter", default="", help="default: the one that runs this")
    options = parser.parse_args()
    print(install(options.folder, name=options.name, interpreter=options.interpreter))


if __name__ == "__main__":
    main()
