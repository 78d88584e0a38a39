"""What a test run must not leave on the machine: processes, network namespaces, interfaces, pins and cgroups.

Processes are told by a mark in their environment, and labs by the process that owns them, so those are always this
run's own. The rest is whatever is new since the run began; another run on the same machine at the same time shows up
there, see ``MYCEL_LEAKS`` in ``conftest.py``.

``python -m tests.leaks note`` says what is there, for ``python -m tests.leaks check NOTE`` after a run in several parts.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lab import cgroups, state

MARK = "MYCEL_TEST_RUN"

#: Python's own helpers live as long as the interpreter.
_OWN_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def mark_this_run() -> str:
    """Mark this process, and thereby all it starts from now on."""
    mark = uuid.uuid4().hex
    os.environ[MARK] = mark
    return mark


def processes(mark: str) -> list[str]:
    """Living processes started by the marked run, wherever they were reparented to, as "pid command".

    What a test started again in somebody else's lab (a cluster that stays up, say) ends with that lab.
    """
    found = []
    others = [lab.cgroup for lab in _labs_of_others(mark)]
    kept = {pid for cgroup in others for pid in cgroups.processes(cgroup)}
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        if pid == os.getpid() or pid in kept or not _is_marked(pid, mark):
            continue
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it ended while we looked
            continue
        if not any(helper in command for helper in _OWN_HELPERS):
            found.append(f"{folder.name} {command[:120]}")
    return found


@dataclass(frozen=True, slots=True)
class Things:
    """What of ours can be seen on the machine at one moment, by kind."""

    namespaces: frozenset[str]
    interfaces: frozenset[str]
    pins: frozenset[str]
    cgroups: frozenset[str]
    labs: frozenset[str]

    def minus(self, earlier: Things) -> list[str]:
        """What is here and was not before, one line each."""
        lines = []
        for kind in fields(self):
            new = getattr(self, kind.name) - getattr(earlier, kind.name)
            lines += [f"{kind.name[:-1]} {name}" for name in sorted(new)]
        return lines


def look(mark: str) -> Things:
    """What is on the machine now, but for the labs of other living processes."""
    groups = [path for pattern in ("mycel*", "*/mycel*") for path in cgroups.root().glob(pattern)]
    labs = list(Path(tempfile.gettempdir()).glob(f"{state.PREFIX}*"))
    theirs = _labs_of_others(mark)
    others = {lab.folder.name for lab in theirs}
    links = {link for lab in theirs for link in lab.links}
    return Things(
        namespaces=_listing(Path("/run/netns")),
        interfaces=_listing(Path("/sys/class/net")) - links,
        pins=frozenset(str(path) for path in Path("/sys/fs/bpf").glob("mycel*")),
        cgroups=frozenset(str(path) for path in groups if path.name not in others),
        labs=frozenset(str(path) for path in labs if path.name not in others),
    )


def left_over(mark: str, before: Things, *, wait_for_things: bool) -> tuple[list[str], list[str]]:
    """Wait up to five seconds for everything to go, then return (processes, other things) still here."""
    deadline = time.monotonic() + 5.0
    while True:
        running, things = processes(mark), look(mark).minus(before)
        if not (running or (things and wait_for_things)) or time.monotonic() > deadline:
            return running, things
        time.sleep(0.1)


def _labs_of_others(mark: str) -> list[state.State]:
    """Labs of living processes that are not of the marked run."""
    return [
        lab
        for lab in state.labs()
        if not lab.stale and lab.pid != os.getpid() and not _is_marked(lab.pid, mark)
    ]


def _is_marked(pid: int, mark: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it ended, or it is not ours to read
        return False
    return f"{MARK}={mark}".encode() in environment


def _listing(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except FileNotFoundError:
        return frozenset()


def main(arguments: list[str]) -> int:
    """See the module; 1 if something was left."""
    if arguments == ["note"]:
        print(json.dumps({kind: sorted(names) for kind, names in asdict(look("")).items()}))
        return 0
    before = Things(**{kind: frozenset(names) for kind, names in json.loads(arguments[1]).items()})
    deadline = time.monotonic() + 10.0
    while (left := look("").minus(before)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for line in left:
        print(f"left on the machine: {line}")
    return 1 if left and os.environ.get("MYCEL_LEAKS") != "report" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
