"""Builds layers and images: what a layer's inputs are, whether the cache has it already, what an image is put together from."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import subprocess
import tarfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy.images import debian, elf, headers, oci, plugin, python, sbom
from deploy.images.tree import Tree, digest

_HERE = Path(__file__).parent
ROOT = _HERE.parent.parent


class BuildError(Exception):
    """An image cannot be built; the message says why."""


@dataclass(frozen=True)
class Built:
    """A layer with what it is made of."""

    layer: oci.Layer
    debian: list[debian.Package]
    python: list[python.Distribution]
    cached: bool


@dataclass(frozen=True)
class Result:
    """An image that was written."""

    name: str
    reference: str
    archive: Path
    digest: str
    layers: list[Built]

    @property
    def size(self) -> int:
        return sum(built.layer.size for built in self.layers)


class Builder:
    """``cache`` keeps packages and layers by hash; what is there is checked or follows from its name."""

    def __init__(
        self, architecture: str, cache: Path, *, root: Path = ROOT, epoch: int | None = None
    ) -> None:
        self.architecture = architecture
        self.contents = tomllib.loads((_HERE / "contents.toml").read_text())
        self.root = root
        self.cache = cache
        self.epoch = last_change(root) if epoch is None else epoch
        self.version = python.version(root)
        self.lock = debian.Lock.read(lock_path(architecture))
        self._apt: debian.Apt | None = None
        self._trees: dict[str, Tree] = {}
        self._layers: dict[str, Built] = {}
        # A change of the builder is a change of what it builds.
        self._code = digest(b"".join(path.read_bytes() for path in sorted(_HERE.glob("*.py"))))

    def image(self, name: str, folder: Path, reference: str) -> Result:
        about = self.contents["images"][name]
        built = [self.layer(layer) for layer in about["layers"]]
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / f"{name}.tar"
        created = datetime.fromtimestamp(self.epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        manifest = oci.write(
            oci.Image(
                reference=reference,
                architecture=self.architecture,
                created=created,
                user=about["user"],
                command=about["command"],
                environment=environment(about),
                layers=[one.layer for one in built],
                labels={
                    "org.opencontainers.image.title": f"mycel-{name}",
                    "org.opencontainers.image.version": self.version,
                    "org.opencontainers.image.licenses": "Apache-2.0",
                },
            ),
            archive,
        )
        materials = sbom.Materials(
            [p for one in built for p in one.debian], [d for one in built for d in one.python]
        )
        text = sbom.document(f"mycel-{name}", self.version, self.architecture, manifest, created, materials)
        (folder / f"{name}.spdx.json").write_bytes(text)
        return Result(name, reference, archive, manifest, built)

    def layer(self, name: str) -> Built:
        if name not in self._layers:
            key = self._key(name)
            file = self.cache / "layers" / f"{name}-{key}.tar"
            note = file.with_suffix(".json")
            cached = note.exists() and file.exists()
            if cached:
                for path in (file, note):
                    os.utime(path)
            else:
                forget_unused(file.parent)
                self._make(name, file, note)
            given = json.loads(note.read_text())
            self._layers[name] = Built(
                oci.Layer(name, file, given["digest"], given["size"]),
                [debian.Package(**one) for one in given["debian"]],
                [python.Distribution(**one) for one in given["python"]],
                cached,
            )
        return self._layers[name]

    def unpack(self, folder: Path) -> None:
        """Write the files of every layer below ``folder``, for a builder that makes its own archives of them."""
        for name in dict.fromkeys(
            layer for image in self.contents["images"].values() for layer in image["layers"]
        ):
            with tarfile.open(self.layer(name).layer.file) as archive:
                archive.extractall(folder / name, filter="fully_trusted")

    def tree(self, name: str) -> Tree:
        """The files of a layer (not from the cache)."""
        if name not in self._trees:
            make: dict[str, Callable[[], Tree]] = {
                "base": self._base,
                "kernel": self._kernel,
                "headers": self._headers,
                "plugin": lambda: plugin.bundle(self.tree("base"), self._debian(["busybox-static"])),
                "mycel": self._mycel,
            }
            self._trees[name] = make[name]()
        return self._trees[name]

    def _make(self, name: str, file: Path, note: Path) -> None:
        distributions: list[python.Distribution] = []
        if name == "python":
            tree, distributions = python.dependencies(self.root, self.architecture, self.cache.parent)
            tree.entries.update(python.compiled(tree).entries)
            self._trees[name] = tree
        tree = self.tree(name)
        self._check_libraries(name, tree)
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        with aside.open("w+b") as out:
            tree.tar(out, mtime=self.epoch if name == "mycel" else self.lock.epoch)
        data = aside.read_bytes()
        aside.rename(file)
        about = {
            "digest": digest(data),
            "size": len(data),
            "debian": [asdict(package) for package in self._packages(name)],
            "python": [asdict(one) for one in distributions],
        }
        aside.write_text(json.dumps(about))
        aside.rename(note)

    def _key(self, name: str) -> str:
        inputs: list[Any] = [self._code, self.architecture, self.lock.epoch]
        inputs.append([asdict(package) for package in self._packages(name)])
        inputs.append(self.contents["layers"].get(name))
        if name == "python":
            inputs.append((self.root / "requirements.lock").read_text())
        if name == "headers":
            inputs += [path.read_text() for path in self._sources()]
        if name == "plugin":
            inputs.append(self._key("base"))
        if name == "mycel":
            inputs.append(self.epoch)
            # What the wheel may take in: everything in its packages that is no leftover of a run.
            project = tomllib.loads((self.root / "pyproject.toml").read_text())
            folders = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
            for path in sorted(p for folder in folders for p in (self.root / folder).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    inputs.append((str(path.relative_to(self.root)), digest(path.read_bytes())))
            inputs += [
                (self.root / file).read_text()
                for file in ("pyproject.toml", "README.md", "LICENSE", ".gitignore")
            ]
        return digest(json.dumps(inputs, sort_keys=True).encode())[:32]

    def _packages(self, layer: str) -> list[debian.Package]:
        about = self.contents["layers"].get(layer, {})
        names = [*about.get("debian", ()), *(self.lock.headers if "headers" in about else ())]
        if missing := [name for name in names if name not in self.lock.packages]:
            raise BuildError(
                f"{lock_path(self.architecture).name} lacks {', '.join(missing)}: "
                "take them with `python -m deploy.images lock`"
            )
        return [self.lock.packages[name] for name in names]

    def _debian(self, names: list[str]) -> Tree:
        tree = Tree()
        for name in names:
            with debian.files_of(self._fetched(self.lock.packages[name])) as archive:
                tree.add_archive(archive)
        return tree

    def _fetched(self, package: debian.Package) -> Path:
        file = self.cache / "debian" / f"{package.sha256}.deb"
        if not file.exists() or digest(file.read_bytes()) != package.sha256:
            file.parent.mkdir(parents=True, exist_ok=True)
            if self._apt is None:
                self._apt = debian.Apt(self.cache / "apt", self.architecture)
            self._apt.download(package, file)
        return file

    def _layer_of(self, name: str) -> Tree:
        about = self.contents["layers"][name]
        tree = self._debian(about["debian"])
        tree.drop(about.get("drop", []))
        return tree

    def _base(self) -> Tree:
        tree = self._layer_of("base")
        for name in ("bin", "lib", "sbin"):
            tree.link(name, f"usr/{name}")
        if any(path.startswith("usr/lib64/") for path in tree.entries):
            tree.link("lib64", "usr/lib64")
        for name in ("proc", "sys", "dev", "run", "var/lib", "etc/mycel", "root"):
            tree.folder(name)
        tree.folder("tmp", 0o1777)
        tree.add(
            "etc/passwd", "root:x:0:0:root:/root:/sbin/nologin\nmycel:x:15008:15008:mycel:/:/sbin/nologin\n"
        )
        tree.add("etc/group", "root:x:0:\nmycel:x:15008:\n")
        tree.add("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
        tree.link("usr/bin/python3", "python3.11")
        tree.entries.update(python.compiled(tree).entries)
        return tree

    def _kernel(self) -> Tree:
        tree = self._layer_of("kernel")
        tree.entries.update(python.compiled(tree).entries)
        return tree

    def _headers(self) -> Tree:
        whole = self._debian(list(self.lock.headers))
        return headers.reachable(whole, self.architecture, self._sources())

    def _mycel(self) -> Tree:
        tree = python.project(self.root, self.epoch)
        tree.entries.update(python.compiled(tree).entries)
        return tree

    def _sources(self) -> list[Path]:
        return sorted(path for suffix in ("*.c", "*.h") for path in (self.root / "bpf").rglob(suffix))

    def _check_libraries(self, name: str, tree: Tree) -> None:
        """A library that nobody brings is found here, not on a node."""
        below = Tree({**self.tree("base").entries, **tree.entries}) if name != "base" else tree
        # A link that leads nowhere is no library.
        libraries = [path for path in below.entries if ".so" in path]
        have = {posixpath.basename(p) for p in libraries if plugin.resolve(below, p) in below.entries}
        lacks = []
        for path, data in tree.files():
            if not elf.is_elf(data):
                continue
            file = elf.read(data)
            lacks += [f"{path} needs {needed}" for needed in file.needed if needed not in have]
            if file.interpreter and plugin.resolve(below, file.interpreter) not in below.entries:
                lacks.append(f"{path} needs {file.interpreter}")
        if lacks:
            raise BuildError(f"layer {name}: " + "; ".join(lacks))


def forget_unused(layers: Path, days: float = 14.0) -> None:
    """Remove layers that no build has used for so long: each change of code leaves some, hundreds of megabytes a day."""
    oldest = time.time() - days * 86400
    for path in layers.glob("*.*"):
        with contextlib.suppress(FileNotFoundError):  # somebody else was quicker
            if path.stat().st_mtime < oldest:
                path.unlink()


def lock_path(architecture: str) -> Path:
    return _HERE / f"packages.{architecture}.lock"


def environment(image: dict[str, Any]) -> dict[str, str]:
    """The variables of an image as contents.toml has it."""
    always = {"LANG": "C.UTF-8", "PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**always, **image["environment"]}


def make_lock(architecture: str, cache: Path) -> Path:
    """Take the newest versions that the machine's Debian suite has."""
    contents = tomllib.loads((_HERE / "contents.toml").read_text())
    names = {name for layer in contents["layers"].values() for name in layer["debian"]}
    headers_name = next(layer["headers"] for layer in contents["layers"].values() if "headers" in layer)
    apt = debian.Apt(cache / "apt", architecture)
    today = int(time.time()) // 86400 * 86400
    lock = debian.lock(apt, names, headers_name.format(architecture=architecture), architecture, today)
    path = lock_path(architecture)
    lock.write(path)
    return path


def last_change(root: Path) -> int:
    """SOURCE_DATE_EPOCH, else the time of the last commit, seconds since 1970.

    :raises BuildError: neither is known.
    """
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        if not given.isdecimal():
            raise BuildError(f"SOURCE_DATE_EPOCH: {given!r} is no number of seconds")
        return int(given)
    done = subprocess.run(
        ["git", "log", "-1", "--format=%ct"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode or not done.stdout.strip().isdecimal():
        raise BuildError("no git history here: set SOURCE_DATE_EPOCH")
    return int(done.stdout)
