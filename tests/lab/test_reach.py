"""A checkout in a folder that only its owner may enter, and processes that are somebody else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lab import reach

pytestmark = pytest.mark.privileged


def read(paths: list[Path], file: Path) -> subprocess.CompletedProcess[str]:
    """Read a file as the proxies' user, where the paths were made reachable."""
    script = f"set -e\nmount -t tmpfs lab /run\n{reach.script(paths)}\n"
    script += f"exec setpriv --reuid 15008 --regid 15008 --clear-groups cat '{file}'"
    return subprocess.run(
        ["unshare", "--mount", "--propagation=private", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=20,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Closed, below folders that are open; with a checkout two closed folders down."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder == Path("/tmp"):
            break
        folder.chmod(0o755)
    home = tmp_path / "home of one"
    for part in ("private/checkout/code", "private/checkout/venv", "cache"):
        (home / part).mkdir(parents=True)
    (home / "private/checkout/code/file").write_text("read")
    (home / "cache/file").write_text("cached")
    (home / "secret").write_text("no")
    (home / "private").chmod(0o700)
    home.chmod(0o700)
    return home


def test_it_is_reached_and_nothing_else_is(home: Path):
    checkout, cache = home / "private/checkout", home / "cache"
    assert read([], checkout / "code/file").returncode != 0
    paths = [checkout, checkout / "venv", cache]
    assert read(paths, checkout / "code/file").stdout == "read"
    assert read(paths, cache / "file").stdout == "cached"
    assert "No such file" in read(paths, home / "secret").stderr


def test_what_can_be_reached_is_left_alone(tmp_path: Path):
    assert reach.script([Path("/usr/bin"), Path("/usr/bin"), Path("/etc/hosts")]) == ""
