"""The lab's state file, and the reaping of labs whose owner is gone.

A lab is a folder with ``state.json`` and a cgroup subtree of the same name. Namespaces and mounts have no life of their
own (processes of the subtree hold them), so ending these, removing the cgroups and then the folder removes all of it; a link
into the machine's own namespace has the lab's name as its alias, so that it need not wait for the kernel to end the other. The
folder is made first and removed last: whatever is left always has its state file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import cgroups

PREFIX = "mycel-lab-"


def base() -> Path:
    return Path(tempfile.gettempdir())


@dataclass(frozen=True)
class State:
    """Who owns the lab (``pid`` and its start time, since numbers come again) and what belongs to it."""

    id: str
    pid: int
    started: int  #: clock ticks since boot, field 22 of /proc/PID/stat
    boot: str

    @property
    def folder(self) -> Path:
        return base() / f"{PREFIX}{self.id}"

    @property
    def cgroup(self) -> Path:
        return cgroups.root() / f"{PREFIX}{self.id}"

    @property
    def alias(self) -> str:
        """Of its links in the machine's own network namespace."""
        return f"{PREFIX}{self.id}"

    @property
    def links(self) -> set[str]:
        """Those that are there."""
        return {
            path.parent.name for path in Path("/sys/class/net").glob("*/ifalias") if _read(path) == self.alias
        }

    @property
    def stale(self) -> bool:
        return self.boot != _boot() or self.started != _started(self.pid)


def create(id: str = "") -> State:
    """A new lab's folder and state file, owned by this process.

    :raises FileExistsError: a lab of this ``id`` is there.
    """
    if id:
        folder = base() / f"{PREFIX}{id}"
        folder.mkdir(mode=0o700)
    else:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base()))
    # Proxies are somebody else, and read their bundle and credential below; nobody else has business in it.
    folder.chmod(0o711)
    state = State(folder.name.removeprefix(PREFIX), os.getpid(), _started(os.getpid()), _boot())
    temporary = folder / ".state.json"
    temporary.write_text(json.dumps(asdict(state)))
    temporary.rename(folder / "state.json")
    return state


def labs() -> list[State]:
    """Every lab of this user on the machine, stale ones too."""
    found: list[State] = []
    for folder in sorted(base().glob(f"{PREFIX}*")):
        try:
            if folder.stat().st_uid != os.geteuid() or not folder.is_dir() or folder.is_symlink():
                continue
            values = json.loads((folder / "state.json").read_text())
            found.append(State(values["id"], values["pid"], values["started"], values["boot"]))
        except (OSError, ValueError, KeyError):
            continue  # being made or removed at this moment
    return found


def note(state: State, name: str, *, net: Path, cgroup: Path, mount: Path | None = None) -> None:
    """Tell other processes (``python -m lab exec``) how to get to a place of the lab."""
    folder = state.folder / "places"
    folder.mkdir(exist_ok=True)
    values = {"net": str(net), "cgroup": str(cgroup), "mount": str(mount) if mount else ""}
    (folder / f"{name}.json").write_text(json.dumps(values))


def places(state: State) -> dict[str, dict[str, str]]:
    """The lab's places by name; those that are gone are left out."""
    found = {
        path.stem: json.loads(path.read_text()) for path in sorted((state.folder / "places").glob("*.json"))
    }
    return {name: values for name, values in found.items() if Path(values["net"]).exists()}


def reap(state: State) -> None:
    """Remove everything of the lab, whoever owns it."""
    for link in state.links:
        subprocess.run(["/usr/sbin/ip", "link", "del", link], stderr=subprocess.DEVNULL, check=False)
    if state.cgroup.is_dir():
        cgroups.kill(state.cgroup)
    for hierarchy in cgroups.hierarchies():
        if (folder := hierarchy / state.cgroup.name).is_dir():
            cgroups.remove(folder)
    shutil.rmtree(state.folder, ignore_errors=True)


def reap_stale() -> list[State]:
    """Remove every lab whose owner is gone; those are given back."""
    stale = [state for state in labs() if state.stale]
    for state in stale:
        reap(state)
    return stale


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> int:
    """Field 22 of /proc/PID/stat; 0 for a process that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
