"""What the plugin's process imports and how long it takes to start: a runtime starts it several times per pod."""

import os
import resource
import subprocess
import sys

import pytest

from cni.install import install, launcher

#: Every module that may be loaded when the plugin has done its work. Longer is slower: about 0.2 ms each.
ALLOWED = {
    "__future__", "__main__", "_abc", "_codecs", "_collections_abc", "_frozen_importlib",
    "_frozen_importlib_external", "_imp", "_io", "_json", "_signal", "_socket", "_stat", "_thread", "_warnings",
    "_weakref", "abc", "builtins", "cni", "cni.fastjson", "cni.plugin", "cni.protocol", "codecs", "encodings",
    "encodings.aliases", "encodings.utf_8", "fcntl", "genericpath", "io", "marshal", "os", "os.path", "posix",
    "posixpath", "stat", "sys", "time", "winreg", "zipimport",
}  # fmt: skip


def loaded(plugin, command, stdin=b"{}", **environment):
    """The modules that a call has loaded when it ends."""
    text = plugin.read_text().replace(
        "\nmain()\n", '\ntry:\n    main()\nfinally:\n    print("loaded:", *sys.modules, file=sys.stderr)\n'
    )
    spy = plugin.with_name("spy")
    spy.write_text(text)
    spy.chmod(0o755)
    done = subprocess.run(
        [spy], input=stdin, env={"CNI_COMMAND": command, **environment}, capture_output=True, check=False
    )
    return set(done.stderr.decode().rpartition("loaded:")[2].split())


@pytest.mark.parametrize("command", ["VERSION", "DEL", "STATUS"])
def test_imports(tmp_path, command):
    plugin = install(tmp_path)
    config = b'{"cniVersion": "1.1.0", "name": "n", "runDir": "/proc/nowhere", "logLevel": "error"}'
    modules = loaded(plugin, command, config, CNI_CONTAINERID="c", CNI_IFNAME="eth0")
    assert modules - ALLOWED == set()
    assert "cni.plugin" in modules


def test_the_environment_changes_nothing(tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit(99)")
    plugin = install(tmp_path)
    environment = {
        "CNI_COMMAND": "VERSION",
        "PYTHONPATH": str(tmp_path),
        "PYTHONSTARTUP": str(tmp_path / "json.py"),
    }
    done = subprocess.run(
        [plugin], input=b"{}", env=environment, cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0


def test_it_starts_fast(tmp_path):
    """By the processors' time that it takes, so that others on the machine count little; about 9 ms against 7."""
    plugin = install(tmp_path)
    interpreter = os.path.realpath(sys.executable)

    def cost(*command):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            command, input=b"{}", env={"CNI_COMMAND": "VERSION"}, stdout=subprocess.DEVNULL, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    rounds = [(cost(plugin), cost(interpreter, "-ISE", "-c", "")) for _ in range(15)]
    ours, bare = (min(times) for times in zip(*rounds, strict=True))
    print(f"plugin {ours * 1000:.1f} ms, bare interpreter {bare * 1000:.1f} ms")
    assert ours < max(0.015, bare * 2.5)


@pytest.mark.parametrize("path", ["relative/python", "/with space/python", "/" + "x" * 130])
def test_launcher_refuses_what_cannot_start(path):
    with pytest.raises(ValueError, match="#!"):
        launcher(path, "/packages")
