"""Debian packages by name, version and hash: resolves, locks, fetches and unpacks them; changes nothing on the machine.

apt works in a state folder of ours, with the machine's own sources and keys; dpkg-deb unpacks. Who signs is Debian, what was
signed when the lock was made is in the lock, so that a fetch that brings other bytes fails.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy.images.tree import digest

_SOURCES = ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list")


class DebianError(Exception):
    """A package cannot be had; the message says which and what to do."""


@dataclass(frozen=True)
class Package:
    """One binary package. ``source`` is the source package with its version, as licences and advisories name it."""

    name: str
    version: str
    architecture: str
    sha256: str
    size: int
    source: str


def architecture() -> str:
    """The machine's, in Debian's words."""
    return _run("dpkg", "--print-architecture").strip()


class Apt:
    """apt-get in a folder of its own."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self._folder = folder / architecture
        self._architecture = architecture
        self._updated = False
        sources = next((path for path in _SOURCES if os.path.exists(path)), None)
        if sources is None:
            raise DebianError(f"no Debian sources: neither {' nor '.join(_SOURCES)}")
        for name in ("state/lists/partial", "cache/archives/partial"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        (self._folder / "status").touch()
        options = {
            "APT::Architecture": architecture,
            "APT::Architectures::": architecture,
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Dir::Cache": str(self._folder / "cache"),
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "-",
            "Dir::State": str(self._folder / "state"),
            "Dir::State::status": str(self._folder / "status"),
        }
        configuration = self._folder / "apt.conf"
        configuration.write_text(
            "#clear APT::Architectures;\n" + "".join(f'{key} "{value}";\n' for key, value in options.items())
        )
        self._environment = {**os.environ, "APT_CONFIG": str(configuration), "LC_ALL": "C"}

    def show(self, name: str) -> dict[str, str]:
        """The fields of the newest version."""
        self._update()
        text = self._apt("apt-cache", "show", "--no-all-versions", name)
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", text, re.MULTILINE))
        if "SHA256" not in fields:
            raise DebianError(f"Debian package {name}: not found for {self._architecture}")
        return fields

    def download(self, package: Package, target: Path) -> None:
        """:raises DebianError: this version cannot be had any more, or its bytes are other ones."""
        self._update()
        folder = self._folder / "download"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        try:
            self._apt("apt-get", "-q", "download", f"{package.name}={package.version}", cwd=folder)
        except DebianError as error:
            raise DebianError(
                f"{error}\nDebian package {package.name} {package.version} is locked and cannot be had: "
                "take the present versions with `python -m deploy.images lock`"
            ) from None
        (file,) = folder.iterdir()
        if (got := digest(file.read_bytes())) != package.sha256:
            raise DebianError(
                f"Debian package {package.name} {package.version}: sha256 is {got}, locked {package.sha256}"
            )
        file.rename(target)

    def _update(self) -> None:
        if not self._updated:
            self._apt("apt-get", "-q", "update")
            self._updated = True

    def _apt(self, *command: str, cwd: Path | None = None) -> str:
        return _run(*command, cwd=cwd, environment=self._environment)


def _run(*command: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DebianError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise DebianError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Lock:
    """``epoch`` is when the versions were taken: the time of all files that come from them, seconds since 1970."""

    architecture: str
    epoch: int
    packages: dict[str, Package]
    #: The package of kernel headers, and the common part that it needs.
    headers: tuple[str, str]

    @classmethod
    def read(cls, path: Path) -> Lock:
        """:raises DebianError: there is none for this architecture."""
        try:
            given = json.loads(path.read_text())
        except FileNotFoundError:
            raise DebianError(
                f"{path.name} is not there: make it with `python -m deploy.images lock --architecture ...`"
            ) from None
        packages = {item["name"]: Package(**item) for item in given["packages"]}
        one, common = given["headers"]
        return cls(given["architecture"], given["epoch"], packages, (one, common))

    def write(self, path: Path) -> None:
        packages = [asdict(self.packages[name]) for name in sorted(self.packages)]
        lines = ",\n".join("  " + json.dumps(package) for package in packages)
        path.write_text(
            f'{{"architecture": "{self.architecture}", "epoch": {self.epoch}, "headers": {json.dumps(self.headers)},\n'
            f'"packages": [\n{lines}\n]}}\n'
        )


def lock(apt: Apt, names: Iterable[str], headers: str, architecture: str, epoch: int) -> Lock:
    """The newest version of each package; ``headers`` is the package that depends on the present kernel's."""
    specific = apt.show(headers)["Depends"].split(" ", 1)[0]
    common = next(
        name
        for name in re.findall(r"linux-headers-\S+", apt.show(specific)["Depends"])
        if name.endswith("-common")
    )
    packages = {}
    for name in sorted({*names, specific, common}):
        fields = apt.show(name)
        source, _, version = fields.get("Source", name).partition(" ")
        packages[name] = Package(
            name=fields["Package"],
            version=fields["Version"],
            architecture=fields["Architecture"],
            sha256=fields["SHA256"],
            size=int(fields["Size"]),
            source=f"{source} {version.strip('()') or fields['Version']}",
        )
    return Lock(architecture, epoch, packages, (specific, common))


def files_of(package: Path) -> tarfile.TarFile:
    """What the package installs."""
    done = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, timeout=600, check=False
    )
    if done.returncode:
        raise DebianError(f"{package}: dpkg-deb cannot unpack it")
    return tarfile.open(fileobj=io.BytesIO(done.stdout))
