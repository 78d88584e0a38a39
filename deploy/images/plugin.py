"""What the CNI plugin brings to a node that may have no Python, glibc or shell: interpreter, libraries, loader, static shell.

The agent copies it to the node (``cni.install``). The launcher there starts the static busybox, whose shell replaces itself by
the dynamic loader with our libraries, and that runs the interpreter: nothing of the host's is used but its kernel.
"""

from __future__ import annotations

import posixpath

from deploy.images import elf, python
from deploy.images.tree import Entry, Tree, merged

#: Where the agent's image has it.
TARGET = "usr/lib/mycel/plugin"
#: Modules of the standard library in source form that the plugin loads, and those that show an unexpected exception.
_MODULES = (
    "__future__", "_collections_abc", "_sitebuiltins", "_weakrefset", "abc", "codecs", "collections/__init__", "collections/abc",
    "contextlib", "copyreg", "encodings/__init__", "encodings/aliases", "encodings/ascii", "encodings/latin_1", "encodings/utf_8",
    "enum", "functools", "genericpath", "io", "json/__init__", "json/decoder", "json/encoder", "json/scanner", "keyword",
    "linecache", "operator",
    "os", "posixpath", "re/__init__", "re/_casefix", "re/_compiler", "re/_constants", "re/_parser", "reprlib", "stat",
    "token", "tokenize", "traceback", "types", "warnings",
)  # fmt: skip
_EXTENSIONS = ("_json",)


class PluginError(Exception):
    """The base image lacks what the plugin needs."""


def bundle(base: Tree, busybox: Tree) -> Tree:
    """``base`` has the interpreter and its libraries, ``busybox`` the static shell."""
    result = Tree()
    interpreter = _file(base, python.INTERPRETER.removeprefix("/"))
    loader = elf.read(interpreter).interpreter
    shell = _file(busybox, "usr/bin/busybox")
    if elf.read(shell).interpreter:
        raise PluginError("busybox is not static")
    result.add(f"{TARGET}/busybox", shell, 0o755)
    result.add(f"{TARGET}/bin/python3.11", interpreter, 0o755)
    result.add(f"{TARGET}/lib/ld.so", _file(base, loader), 0o755)
    extensions = {name: _extension(base, name) for name in _EXTENSIONS}
    waiting = [interpreter, *extensions.values()]
    while waiting:
        for name in elf.read(waiting.pop()).needed:
            if name != posixpath.basename(loader) and f"{TARGET}/lib/{name}" not in result.entries:
                library = _file(base, _library(base, name))
                result.add(f"{TARGET}/lib/{name}", library)
                waiting.append(library)
    for name, data in extensions.items():
        result.add(f"{TARGET}/lib/python3.11/lib-dynload/{name}.so", data)
    for name in _MODULES:
        source = _file(base, f"usr/lib/python3.11/{name}.py")
        code = compile(source, f"{name}.py", "exec", dont_inherit=True, optimize=0)
        result.add(f"{TARGET}/lib/python3.11/{name}.pyc", python.byte_code(source, code))
    return result


def _extension(base: Tree, name: str) -> bytes:
    folder = "usr/lib/python3.11/lib-dynload/"
    path = next((p for p, _ in base.files(".so") if p.startswith(f"{folder}{name}.")), f"{folder}{name}")
    return _file(base, path)


def _library(base: Tree, name: str) -> str:
    return next((p for p in base.entries if posixpath.basename(p) == name and p.startswith("usr/lib/")), name)


def _file(tree: Tree, path: str) -> bytes:
    """The content, links followed."""
    at = resolve(tree, path)
    entry = tree.entries.get(at)
    if entry is None or entry.data is None:
        raise PluginError(f"{path} is not there")
    return entry.data


def resolve(tree: Tree, path: str) -> str:
    """Where ``path`` leads, through links and the merged /usr."""
    for _ in range(16):
        path = merged(posixpath.normpath(path).lstrip("/"))
        entry: Entry | None = tree.entries.get(path)
        if entry is None or not entry.link:
            return path
        path = posixpath.join("/", posixpath.dirname(path), entry.link)
    return path
