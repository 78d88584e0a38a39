"""The plugin as the agent's image brings it: it starts where there is nothing of the host's, and old ones go in time."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cni import install
from deploy.images import debian
from deploy.images.__main__ import cache_folder
from deploy.images.build import Builder
from tests.cni.test_start_up import ALLOWED
from tests.requirements import require_root

pytestmark = pytest.mark.privileged
BIN = "opt/cni/bin"


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the agent has it at /usr/lib/mycel/plugin; the layer is that of `make image`."""
    require_root()
    layer = Builder(debian.architecture(), cache_folder()).layer("plugin").layer.file
    folder = tmp_path_factory.mktemp("layer")
    subprocess.run(["tar", "-xf", layer, "-C", folder], check=True)
    return folder / "usr/lib/mycel/plugin"


@pytest.fixture
def host(tmp_path: Path, bundle: Path) -> Path:
    """A host that has no shell, no libc, no Python, no /proc: only a folder of CNI plugins."""
    (tmp_path / BIN).mkdir(parents=True)
    assert install.install_bundle(tmp_path / BIN, bundle, f"/{BIN}")
    return tmp_path


def call(
    host: Path, stdin: str = "{}", command: tuple[str, ...] = (f"/{BIN}/mycel",), **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        preexec_fn=lambda: os.chroot(host),  # a program that does it would be the host's
        cwd="/",
        input=stdin,
        env={"CNI_COMMAND": "VERSION", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_needs_nothing_of_the_host(host):
    done = call(host)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["supportedVersions"][-1] == "1.1.0"
    # Deeper than VERSION: sockets, files, errors of the specification.
    config = json.dumps({"cniVersion": "1.1.0", "name": "n", "runDir": "/run/mycel"})
    done = call(host, config, CNI_COMMAND="DEL", CNI_CONTAINERID="c", CNI_IFNAME="eth0")
    assert done.returncode == 0, done.stdout
    assert len(os.listdir(host / "run/mycel/cni-notes")) == 1
    done = call(host, config, CNI_COMMAND="STATUS")
    assert json.loads(done.stdout)["code"] == 51
    done = call(host, "nonsense", CNI_COMMAND="ADD", CNI_CONTAINERID="c", CNI_IFNAME="eth0", CNI_NETNS="/x")
    assert json.loads(done.stdout)["code"] == 6


def test_the_runtime_s_environment_changes_nothing(host):
    (host / "evil").mkdir()
    (host / "evil/json.py").write_text("raise SystemExit(99)")
    done = call(
        host,
        LD_PRELOAD="/nowhere.so",
        LD_LIBRARY_PATH="/evil",
        PYTHONPATH="/evil",
        PYTHONHOME="/evil",
        PATH="/nowhere",
        ENV="/evil/profile",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_it_writes_nothing_to_the_host(host):
    before = {path: path.stat().st_mtime_ns for path in host.rglob("*")}
    assert call(host).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in host.rglob("*")} == before


def test_an_unexpected_error_is_told_too(host):
    """The modules of a traceback are in the bundle, though no good day needs them."""
    (pyc,) = host.glob(f"{BIN}/.mycel/*/lib/python3.11/cni/protocol.pyc")
    pyc.write_bytes(pyc.read_bytes()[:100])
    done = call(host)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "No module named" not in done.stderr


def test_it_imports_what_it_may(host):
    """The same modules as with the system's interpreter; a test of start-up holds the list."""
    launcher = host / BIN / "mycel"
    spy = launcher.read_text().replace(
        "from cni.plugin import main; main()",
        "import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); from cni.plugin import main; main()",
    )
    launcher.write_text(spy)
    loaded = set(call(host).stderr.split())
    assert "cni.plugin" in loaded
    assert loaded - ALLOWED - {"atexit"} == set()


def test_it_starts_as_fast(host):
    """Against the system's interpreter alone, on the same busy machine; 14 ms against 6 on an idle one."""

    def median(start: Callable[[], object]) -> float:
        times = []
        for _ in range(15):
            begin = time.perf_counter()
            start()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    interpreter = os.path.realpath(sys.executable)
    bare = median(lambda: call(Path("/"), command=(interpreter, "-ISE", "-c", "")))
    ours = median(lambda: call(host))
    print(f"plugin from the bundle {ours * 1000:.1f} ms, bare interpreter {bare * 1000:.1f} ms")
    assert ours < max(0.020, bare * 5)


def test_again_changes_nothing(host, bundle):
    before = {path: path.stat().st_ino for path in host.rglob("*")}
    assert not install.install_bundle(host / BIN, bundle, f"/{BIN}")
    assert {path: path.stat().st_ino for path in host.rglob("*")} == before


@pytest.mark.parametrize("damage", ["missing", "changed", "mode", "more", "launcher"])
def test_what_is_damaged_is_put_right(host, bundle, damage):
    (folder,) = (host / BIN / ".mycel").iterdir()
    match damage:
        case "missing":
            (folder / "lib/ld.so").unlink()
        case "changed":
            (folder / "lib/python3.11/cni/plugin.pyc").write_bytes(b"x")
        case "mode":
            (folder / "busybox").chmod(0o644)
        case "more":
            (folder / "lib/python3.11/json.py").write_text("raise SystemExit(99)")
        case "launcher":
            (host / BIN / "mycel").write_text("")
    assert install.install_bundle(host / BIN, bundle, f"/{BIN}")
    assert call(host).returncode == 0
    assert [p.name for p in (host / BIN / ".mycel").iterdir()] == [folder.name]


def test_an_upgrade_leaves_the_old_one_until_nobody_runs_it(host, bundle, tmp_path):
    """A runtime that read the old launcher still finds what it names; what runs is never taken away."""
    old = next((host / BIN / ".mycel").iterdir())
    newer = tmp_path / "newer"
    shutil.copytree(bundle, newer)
    (newer / "lib/python3.11/keyword.pyc").write_bytes((newer / "lib/python3.11/token.pyc").read_bytes())
    assert install.install_bundle(host / BIN, newer, f"/{BIN}")
    assert old.is_dir()
    assert install.collect(host / BIN) == []  # somebody may be just starting it
    running = subprocess.Popen(
        [old / "lib/ld.so", "--library-path", old / "lib", old / "bin/python3.11", "-ISEc", "input()"],
        stdin=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{running.pid}/exe").resolve().name != "ld.so" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert install.collect(host / BIN, keep=0) == []
        assert old.is_dir()
    finally:
        running.communicate(b"\n", timeout=10)
    assert install.collect(host / BIN, keep=0) == [old.name]
    assert not old.exists()
    assert len(os.listdir(host / BIN / ".mycel")) == 1
    # Back to the old one: it is put there anew, and no mark of its end is left.
    assert install.install_bundle(host / BIN, bundle, f"/{BIN}")
    assert old.is_dir()
    assert not old.with_name(f"{old.name}.outdated").exists()


def test_removed_whole(host):
    install.remove(host / BIN)
    assert os.listdir(host / BIN) == []


def test_no_bundle_no_change(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "empty").mkdir()
    with pytest.raises(install.InstallError, match="no bundle"):
        install.install_bundle(tmp_path / "bin", tmp_path / "empty")
    assert os.listdir(tmp_path / "bin") == []


@pytest.mark.parametrize("path", ["relative", "/with space", "/semi;colon", "/quo'te", "/" + "x" * 120, "/ü"])
def test_a_path_that_a_launcher_cannot_name(path):
    with pytest.raises(ValueError, match="#!"):
        install.bundled_launcher(path)
