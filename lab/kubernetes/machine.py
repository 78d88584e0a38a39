"""A machine of the cluster lab, without a kernel of its own: namespaces held by a process that is PID 1 there.

Owns what a machine is before any daemon runs: its root folder (a real one, with the machine's ``/usr`` read-only), ``/run``,
``/proc``, ``/sys`` with the cgroup hierarchies from its own cgroup down, bpffs, host name, and its end. When the first
process is killed nothing of it is left but the root folder: that is how a machine is switched off.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lab import cgroups
from lab.errors import LabError
from lab.kubernetes.service import Service, same_in_all
from lab.place import Place
from lab.processes import wait_until

#: Of the machine's /etc; the rest is nobody's business on a node.
_ETC = (
    *("passwd", "group", "nsswitch.conf", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives"),
    *("ssl", "ca-certificates", "protocols", "services", "os-release", "debian_version", "localtime"),
)

#: Runs as the first process of the namespaces. $1 folder, $2 host name, $3 programs, $4 "python" or nothing; hierarchies follow.
_INIT = r"""
set -e
root=$1/root usr=$1/usr name=$2 programs=$3 python=$4; shift 4
mount --make-rprivate /
mount --bind "$root" "$root"
if [ "$python" ]; then
  mount --bind /usr "$root/usr"
else
  # Really gone, not covered up: nothing of the machine's Python is found, as on a node that never had it.
  mkdir -p "$usr/upper" "$usr/work"
  mount -t overlay -o "lowerdir=/usr,upperdir=$usr/upper,workdir=$usr/work" usr "$root/usr"
  cd "$root/usr"
  rm -rf bin/python* lib/python* lib/*/libpython* local/bin/python* local/lib/python*
  cd /
fi
mount -o remount,bind,ro "$root/usr"
mount --bind -o ro "$programs" "$root/opt/kubernetes/bin"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t bpf -o mode=700 bpf "$root/sys/fs/bpf"
for kind in debugfs:kernel/debug tracefs:kernel/tracing; do
  mount -t "${kind%%:*}" none "$root/sys/${kind#*:}" 2>/dev/null || true
done
# From inside of the cgroup namespace a hierarchy begins at this machine's cgroup.
if [ "$1" = . ]; then
  mount -t cgroup2 cgroup "$root/sys/fs/cgroup"
else
  mount -t tmpfs -o mode=755 tmpfs "$root/sys/fs/cgroup"
  for hierarchy; do
    mkdir -p "$root/sys/fs/cgroup/$hierarchy"
    case $hierarchy in
      unified) mount -t cgroup2 cgroup "$root/sys/fs/cgroup/unified" ;;
      systemd) mount -t cgroup -o none,name=systemd cgroup "$root/sys/fs/cgroup/systemd" ;;
      *) mount -t cgroup -o "$hierarchy" cgroup "$root/sys/fs/cgroup/$hierarchy" ;;
    esac
  done
fi
cd "$root"
pivot_root . old
cd /
umount -l /old
mount --make-rshared /
mkdir -p /run/netns /run/lock
hostname "$name"
ip link set lo up
for setting in net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0; do
  sysctl -qw "$setting" 2>/dev/null || true
done
touch /run/ready
# An ignored SIGCHLD stays ignored over exec: orphans are reaped by the kernel.
trap '' CHLD
exec sleep infinity
"""


class Machine:
    """Namespaces with a root folder.

    :param folder: of this machine; its root folder is ``root`` in it, and stays when it is switched off.
    :param cgroup: in the unified hierarchy; the same path is used in every other one.
    :param python: leave the machine's Python in ``/usr``; without it the node has none.
    """

    def __init__(
        self, name: str, *, folder: Path, cgroup: Path, programs: Path, python: bool = False
    ) -> None:
        self.name = name
        self.folder = folder
        self.cgroup = cgroup
        self.disk = folder / "root"
        self._programs = programs
        self._python = python

    # -- on and off

    def prepare(self) -> None:
        """Make the root folder: what a machine's disk has before it is switched on for the first time."""
        for name in (
            *("usr", "dev", "proc", "sys", "run", "tmp", "old", "root", "etc", "home", "mnt", "srv"),
            *("var/lib", "var/log", "var/tmp", "var/cache", "opt/kubernetes/bin"),
        ):
            (self.disk / name).mkdir(parents=True, exist_ok=True)
        for name in ("bin", "sbin", "lib", "lib64", "lib32"):
            if Path("/", name).is_symlink():  # Debian merges them into /usr
                (self.disk / name).symlink_to(f"usr/{name}")
        for name in _ETC:
            source = Path("/etc", name)
            if source.is_dir():
                shutil.copytree(
                    source, self.disk / "etc" / name, symlinks=True, ignore_dangling_symlinks=True
                )
            elif source.exists() or source.is_symlink():
                shutil.copy2(source, self.disk / "etc" / name, follow_symlinks=False)
        (self.disk / "etc/hostname").write_text(f"{self.name}\n")
        (self.disk / "etc/hosts").write_text(f"127.0.0.1 localhost {self.name}\n")
        (self.disk / "etc/resolv.conf").write_text("")
        (self.disk / "etc/machine-id").write_text(f"{os.urandom(16).hex()}\n")

    def switch_on(self) -> None:
        """:raises LabError: it did not come up, with what it said."""
        if self.running:
            raise LabError(f"{self.name} is on already")
        self._make_cgroups()
        hierarchies = [path.name for path in cgroups.hierarchies()]
        names = ["."] if cgroups.root() == Path("/sys/fs/cgroup") else hierarchies
        log = self.folder / "init.log"
        init = Service(
            self.name,
            [
                *("/usr/bin/unshare", "--net", "--mount", "--cgroup", "--uts", "--ipc", "--pid", "--fork"),
                *("/bin/sh", "-c", _INIT, "init", str(self.folder), self.name, str(self._programs)),
                *("python" if self._python else "", *names),
            ],
            cgroup=self.cgroup,
            log=log,
            everywhere=True,
        )
        init.start()
        wait_until(
            lambda: (
                (self._first() and Path(f"/proc/{self._first()}/root/run/ready").exists()) or not init.running
            ),
            10.0,
            f"{self.name} is up",
            interval=0.005,
            explain=init.tail,
        )
        if not init.running:
            raise LabError(f"{self.name} does not come up: {init.tail()}")
        # Its root cgroup holds no process, as the root of a machine with systemd does not.
        scopes = same_in_all(self.cgroup / "init.scope")
        for scope in scopes:
            scope.mkdir(exist_ok=True)
            for pid in (scope.parent / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):  # init's last helper, ending
                    (scope / "cgroup.procs").write_text(pid)

    def switch_off(self) -> None:
        """As if its plug was pulled: every process at once, and with them its namespaces, mounts, links and pins."""
        cgroups.kill(self.cgroup)
        for group in same_in_all(self.cgroup):
            if group.is_dir():
                cgroups.remove(group)

    @property
    def running(self) -> bool:
        return self._first() != 0

    @property
    def init(self) -> int:
        """Its first process, by the number that the lab's machine gives it.

        :raises LabError: it is switched off.
        """
        if pid := self._first():
            return pid
        raise LabError(f"{self.name} is switched off")

    @property
    def root(self) -> Path:
        """Its file system, as this process can read it (mounts of it included)."""
        return Path(f"/proc/{self.init}/root")

    def _first(self) -> int:
        for group in (self.cgroup / "init.scope", self.cgroup):
            try:
                pids = (group / "cgroup.procs").read_text().split()
            except OSError:
                continue
            for pid in pids:
                if _number_inside(pid) == "1":
                    return int(pid)
        return 0

    def _make_cgroups(self) -> None:
        # cgroup v1's cpuset is empty in a new group, v2's controllers are off: neither would take a container.
        for group in same_in_all(self.cgroup):
            missing = [folder for folder in (group, *group.parents) if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
            if (group / "cpuset.cpus").exists() and (group / "cgroup.clone_children").exists():
                for folder in (group.parent, group):
                    for name in ("cpuset.cpus", "cpuset.mems"):
                        if not (folder / name).read_text().strip():
                            (folder / name).write_text((folder.parent / name).read_text())
                    (folder / "cgroup.clone_children").write_text("1")
            if (group / "cgroup.subtree_control").exists():
                _delegate(group.parent)
                # (The machine's own cgroup has processes while it starts: its kubelet delegates further.)

    # -- work on it

    def entering(self) -> list[str]:
        """The front of a command line that enters all its namespaces; the command is a child of nsenter."""
        kinds = ("--net", "--mount", "--cgroup", "--uts", "--ipc", "--pid")
        return ["/usr/bin/nsenter", f"--target={self.init}", *kinds, "--"]

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs ``argv`` on it, as a login shell would: in a cgroup of its own."""
        group = self.cgroup / "user.slice"
        joining: list[str] = []
        for path in same_in_all(group):
            path.mkdir(exist_ok=True)
            joining += cgroups.joining(path)
        path_ = "PATH=/opt/kubernetes/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return [*joining, *self.entering(), "/usr/bin/env", path_, "HOME=/root", *argv]

    def run(
        self, argv: Sequence[str], *, timeout: float = 30.0, check: bool = True, input: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on it to its end, with output and errors in ``stdout`` together.

        :raises LabError: another status than 0, with ``check``; or it took over ``timeout`` seconds.
        """
        shown = f"{self.name}: {' '.join(argv)!r}"
        try:
            done = subprocess.run(
                self.command(argv),
                input=input or "",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{shown} took over {timeout} s") from error
        if check and done.returncode != 0:
            raise LabError(f"{shown} ended with status {done.returncode}: {done.stdout.strip()[-2000:]}")
        return done

    def place(self) -> Place:
        """Its network and mount namespaces, for sockets and commands of this machine in there."""
        namespaces = Path(f"/proc/{self.init}/ns")
        return Place(
            self.name, net=namespaces / "net", mount=namespaces / "mnt", cgroup=self.cgroup / "user.slice"
        )

    def service(self, name: str, program: str) -> Service:
        """A daemon on it, in ``system.slice/NAME.service`` as systemd has it, in all hierarchies."""
        return Service(
            f"{self.name} {name}",
            [program],
            cgroup=self.cgroup / "system.slice" / f"{name}.service",
            log=self.folder / f"{name}.log",
            entering=self.entering() if self.running else (),
            everywhere=True,
        )


def _number_inside(pid: str) -> str:
    """The number of a process in its innermost PID namespace; empty if it has but the one that everybody sees."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                numbers = line.split()[1:]
                return numbers[-1] if len(numbers) > 1 else ""
    except OSError:
        pass
    return ""


def _delegate(group: Path) -> None:
    """Switch on cgroup v2's controllers for the children, as far as the machine has them there."""
    available = (group / "cgroup.controllers").read_text().split()
    for controller in available:
        try:
            (group / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError:
            continue
