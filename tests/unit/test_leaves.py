"""Leaf modules stay leaves: whoever speaks a contract must not load the process that owns it."""

import ast
import sys
from pathlib import Path

import pytest

from tests.requirements import ROOT

LEAVES = [
    *(ROOT / "controlplane/api").rglob("*.py"),
    ROOT / "agent/api.py",
    ROOT / "bpf/wire.py",
    ROOT / "cni/fastjson.py",
    ROOT / "cni/protocol.py",
    ROOT / "nodeproxy/api.py",
]
#: What leaves of one package share.
SHARED = {"controlplane": "controlplane.api", "cni": "cni.fastjson"}
ALLOWED = frozenset(sys.stdlib_module_names) | {"common", "msgspec"}


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_leaf_imports_only_what_any_process_may_load(path: Path) -> None:
    own = SHARED.get(path.relative_to(ROOT).parts[0])
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), level=0):
                modules = [module]
            case ast.ImportFrom():
                pytest.fail(f"{path.name}:{node.lineno}: relative import")
            case _:
                continue
        for module in modules:
            inside = own is not None and (module == own or module.startswith(own + "."))
            assert inside or module.partition(".")[0] in ALLOWED, (
                f"{path.name}:{node.lineno} imports {module}"
            )


@pytest.mark.parametrize("package", ["agent", "cni", "common", "controlplane", "l7proxy", "nodeproxy", "bpf"])
def test_a_package_s_own_init_imports_nothing(package: str) -> None:
    """Importing a leaf runs its package's ``__init__``, so that one has a docstring and nothing more."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
