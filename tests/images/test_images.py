"""The images: the same bytes from anywhere, whole, small, and programs in them that run with nothing of the machine's.

Debian and Python packages come from the cache of ``make image``; the first run fetches them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from deploy.images import debian, elf, headers, oci
from deploy.images.__main__ import cache_folder
from deploy.images.build import ROOT, Builder, Result, environment, forget_unused, lock_path
from deploy.images.tree import Tree
from tests.requirements import require_root

IMAGES = ("agent", "mesh")
PROGRAMS = ("mycel", "mycel-agent", "mycel-cni", "mycel-controlplane", "mycel-l7proxy", "mycel-nodeproxy")


def builder(cache: Path) -> Builder:
    """One whose layers are all to be made, from packages that were fetched before."""
    shared = cache_folder()
    (shared / "debian").mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True)
    (cache / "debian").symlink_to(shared / "debian")
    (cache.parent / "uv").symlink_to(shared.parent / "uv")
    return Builder(debian.architecture(), cache, epoch=1_700_000_000)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("images")
    maker = builder(folder / "cache/images")
    return {name: maker.image(name, folder / "out", f"mycel.io/{name}:test") for name in IMAGES}


def read(archive: Path) -> dict[str, Any]:
    """What an importer reads: index, manifest, configuration, each checked by digest and size."""
    with tarfile.open(archive) as file:

        def blob(descriptor: dict[str, Any]) -> bytes:
            member = file.extractfile("blobs/" + descriptor["digest"].replace(":", "/"))
            assert member is not None
            data = member.read()
            assert f"sha256:{hashlib.sha256(data).hexdigest()}" == descriptor["digest"]
            assert len(data) == descriptor["size"]
            return data

        layout, index, docker = (
            json.load(file.extractfile(n) or pytest.fail(n))
            for n in ("oci-layout", "index.json", "manifest.json")
        )
        assert layout == {"imageLayoutVersion": "1.0.0"}
        (entry,) = index["manifests"]
        manifest = json.loads(blob(entry))
        configuration = json.loads(blob(manifest["config"]))
        layers = [blob(layer) for layer in manifest["layers"]]
        assert [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers] == configuration["rootfs"][
            "diff_ids"
        ]
        return {"entry": entry, "configuration": configuration, "layers": layers, "docker": docker}


@pytest.fixture(scope="session")
def roots(built: dict[str, Result], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The images' file systems."""
    require_root()
    folders = {}
    for name in IMAGES:
        folders[name] = tmp_path_factory.mktemp(f"root-{name}")
        for one in built[name].layers:
            subprocess.run(["tar", "-xf", one.layer.file, "-C", folders[name]], check=True)
    return folders


def inside(
    root: Path, *command: str, setup: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with the image as all that there is."""
    script = f'set -e; {setup} exec chroot "$ROOT" "$@"'
    path = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *command],
        env={"ROOT": str(root), "PATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.timeout(600)
def test_two_builds_give_the_same_bytes(built, tmp_path):
    """From another folder, with other hash seeds, another umask and another day, of a copy of the sources."""
    copy = tmp_path / "elsewhere/checkout"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
            os.utime(copy / name, (1, 1))
    shared = cache_folder()
    cache = tmp_path / "cache/images"
    cache.mkdir(parents=True)
    (cache / "debian").symlink_to(shared / "debian")
    (cache.parent / "uv").symlink_to(shared.parent / "uv")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "deploy.images",
            "--cache",
            cache,
            "--output",
            tmp_path / "out",
            "--tag",
            "test",
        ],
        cwd=copy,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "PYTHONHASHSEED": "7", "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        umask=0o077,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in IMAGES:
        for suffix in (".tar", ".spdx.json"):
            first, second = built[name].archive.with_suffix(suffix), tmp_path / "out" / f"{name}{suffix}"
            if name in first.name and first.suffix == ".json":
                first = built[name].archive.with_name(f"{name}.spdx.json")
            assert (
                hashlib.sha256(first.read_bytes()).digest() == hashlib.sha256(second.read_bytes()).digest()
            ), second


def test_a_change_of_code_makes_one_layer(built, tmp_path):
    """Which layers depend on what, by the keys under which they are kept."""
    maker = Builder(debian.architecture(), tmp_path, epoch=1_700_000_000)
    later = Builder(debian.architecture(), tmp_path, epoch=1_800_000_000)
    names = ("base", "kernel", "plugin", "python", "headers", "mycel")
    assert [n for n in names if maker._key(n) != later._key(n)] == ["mycel"]


@pytest.mark.parametrize("name", IMAGES)
def test_archive_is_an_oci_image(built, name):
    image = read(built[name].archive)
    configuration = image["configuration"]
    architecture, variant = oci.PLATFORM[debian.architecture()]
    assert (configuration["architecture"], configuration["os"]) == (architecture, "linux")
    assert configuration.get("variant", "") == variant
    assert configuration["created"] == "2023-11-14T22:13:20Z"
    assert configuration["config"]["User"] == {"agent": "0:0", "mesh": "15008:15008"}[name]
    assert image["entry"]["annotations"]["io.containerd.image.name"] == f"mycel.io/{name}:test"
    assert image["entry"]["digest"] == f"sha256:{built[name].digest}"
    assert image["docker"][0]["RepoTags"] == [f"mycel.io/{name}:test"]


@pytest.mark.parametrize("name", IMAGES)
def test_layers_hold_files_and_nothing_of_this_machine(built, name):
    for layer in built[name].layers:
        with tarfile.open(layer.layer.file) as archive:
            members = archive.getmembers()
        paths = [member.name for member in members]
        assert paths == sorted(paths, key=lambda p: p.split("/"))
        assert len(paths) == len(set(paths))
        assert {(m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, "", "")}
        assert len({m.mtime for m in members}) == 1
        assert not [p for p in paths if p.startswith(("usr/share/man", "usr/share/locale", "usr/share/info"))]
        assert not [m.name for m in members if m.mode & 0o6000], "set-uid"
    last = built[name].layers[-1].layer.file.read_bytes()
    assert str(ROOT).encode() not in last


def test_the_mesh_image_has_neither_shell_nor_compiler(roots):
    programs = {
        p.name
        for folder in ("usr/bin", "usr/sbin", "usr/local/bin")
        for p in (roots["mesh"] / folder).glob("*")
    }
    assert programs & {"sh", "bash", "busybox", "dash", "apt", "dpkg", "gcc", "ld"} == set()
    assert set(PROGRAMS) <= programs
    assert not (roots["mesh"] / "usr/src/linux-headers").exists()


@pytest.mark.privileged
@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_start(roots, name, program):
    done = inside(roots[name], f"/usr/local/bin/{program}", "--help")
    if program == "mycel-cni":
        assert json.loads(done.stdout)["code"] == 4
    else:
        assert done.returncode == 0, done.stderr
        assert re.search("usage", done.stdout, re.IGNORECASE)


@pytest.mark.privileged
@pytest.mark.parametrize("name", IMAGES)
def test_every_module_can_be_imported(roots, name):
    """Also those that a program reaches late; bcc's user only where bcc is."""
    script = """
import importlib, pkgutil, sys
failed = []
for package in ("agent", "bpf", "cli", "cni", "common", "controlplane", "l7proxy", "nodeproxy"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError as error:
                failed.append(f"{module.name}: {error}")
print(failed)
"""
    done = inside(roots[name], "/usr/bin/python3.11", "-c", script)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.privileged
def test_kernel_programs_load_with_what_the_agent_s_image_has(roots):
    """Compiled with the headers of the image, by its LLVM, accepted by this kernel, within the memory that is said."""
    name = f"mycel-image-{os.getpid()}"
    root = roots["agent"]
    unified = next(
        Path(p) for p in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup") if Path(p, "cgroup.procs").exists()
    )
    group = unified / name
    memory = Path("/sys/fs/cgroup/memory", name) if Path("/sys/fs/cgroup/memory").is_dir() else group
    for folder in {group, memory}:
        folder.mkdir()
    try:
        setup = (
            f"echo $$ >{memory}/cgroup.procs;"
            "mount --bind /proc $ROOT/proc; mount --rbind /sys $ROOT/sys; mount -t bpf none $ROOT/sys/fs/bpf;"
            "mount -t tmpfs none $ROOT/tmp;"
        )
        done = inside(
            *(
                root,
                "/usr/bin/python3.11",
                "-m",
                "bpf.loader",
                "--pins",
                "/sys/fs/bpf/mycel",
                "--cgroup",
                str(group),
            ),
            setup=setup,
            BCC_KERNEL_SOURCE="/usr/src/linux-headers",
        )
        assert done.returncode == 0, done.stderr
        assert "sockets" in json.loads(done.stdout)["maps_made"]
        peak = next(p for p in (memory / "memory.peak", memory / "memory.max_usage_in_bytes") if p.exists())
        used = int(peak.read_text()) / 1e6
        print(f"memory of the loader at its peak: {used:.0f} MB")
        assert used < 300
    finally:
        for folder in {group, memory}:
            folder.rmdir()


@pytest.mark.parametrize("name", IMAGES)
def test_bill_of_materials(built, name):
    """SPDX 2.3, as far as its own rules go: identifiers, licences, relations; and what is in the image is in it."""
    text = built[name].archive.with_name(f"{name}.spdx.json").read_text()
    document = json.loads(text)
    assert (document["spdxVersion"], document["dataLicense"], document["SPDXID"]) == (
        "SPDX-2.3",
        "CC0-1.0",
        "SPDXRef-DOCUMENT",
    )
    ids = [package["SPDXID"] for package in document["packages"]]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"SPDXRef-[A-Za-z0-9.-]+", one) for one in ids)
    assert {r["relatedSpdxElement"] for r in document["relationships"]} == set(ids)
    assert built[name].digest in text
    names = {package["name"] for package in document["packages"]}
    assert {"mycel", "python3.11-minimal", "libc6", "grpcio", "cryptography"} <= names
    assert ("libllvm14" in names) == (name == "agent")
    locked = (ROOT / "requirements.lock").read_text()
    for package in document["packages"]:
        (reference,) = package["externalRefs"]
        kind = reference["referenceLocator"].split(":", 1)[1].split("/", 1)[0]
        if kind == "deb":
            assert package["checksums"][0]["algorithm"] == "SHA256"
        elif kind == "pypi" and package["name"] != "mycel":
            name_of = re.sub(r"[-_.]+", "-", package["name"]).lower()
            assert f"{name_of}=={package['versionInfo']}" in locked


@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_locks_name_all_packages_by_hash(architecture):
    lock = debian.Lock.read(lock_path(architecture))
    contents = tomllib.loads((ROOT / "deploy/images/contents.toml").read_text())
    assert {name for layer in contents["layers"].values() for name in layer["debian"]} <= lock.packages.keys()
    assert set(lock.headers) <= lock.packages.keys()
    for package in lock.packages.values():
        assert re.fullmatch("[0-9a-f]{64}", package.sha256)
        assert package.architecture in (architecture, "all")
    assert lock.headers[0].endswith(architecture)


def test_the_containerfile_makes_the_same_images():
    """Layers in the same order, the same user, command and environment: it has them once more, in its own words."""
    contents = tomllib.loads((ROOT / "deploy/images/contents.toml").read_text())["images"]
    text = (ROOT / "deploy/images/Containerfile").read_text()
    stages = dict(re.findall(r"^FROM scratch AS (\w+)\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL))
    assert stages.keys() == contents.keys()
    for name, stage in stages.items():
        assert (
            re.findall(r"^COPY --from=build /layers/(\w+)/ /$", stage, re.MULTILINE)
            == contents[name]["layers"]
        )
        assert re.findall(r"^USER (.*)$", stage, re.MULTILINE) == [contents[name]["user"]]
        assert re.findall(r"^CMD (.*)$", stage, re.MULTILINE) == [json.dumps(contents[name]["command"])]
        (given,) = re.findall(r"^ENV (.*)$", stage, re.MULTILINE)
        assert dict(pair.split("=", 1) for pair in given.split()) == environment(contents[name])


def test_a_package_with_other_bytes_is_refused(tmp_path, monkeypatch):
    maker = builder(tmp_path / "cache/images")
    package = maker.lock.packages["zlib1g"]
    (tmp_path / "cache/images/debian").unlink()
    (tmp_path / "cache/images/debian").mkdir()
    (tmp_path / f"cache/images/debian/{package.sha256}.deb").write_bytes(b"other bytes")

    class Other:
        def download(self, package: debian.Package, target: Path) -> None:
            raise debian.DebianError("fetched anew")

    maker._apt = Other()  # type: ignore[assignment]
    with pytest.raises(debian.DebianError, match="fetched anew"):
        maker._fetched(package)


def test_layers_that_nobody_uses_are_forgotten(tmp_path):
    for name, days in (
        ("mycel-old.tar", 20),
        ("mycel-old.json", 20),
        ("mycel-new.tar", 5),
        ("mycel-new.json", 5),
    ):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - days * 86400,) * 2)
    forget_unused(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mycel-new.tar", "mycel-new.json"}


def test_a_library_that_nobody_brings_is_found_at_build(tmp_path):
    maker = builder(tmp_path / "cache/images")
    maker._trees["base"] = Tree()
    tree = Tree()
    tree.add("usr/bin/program", Path("/bin/ls").read_bytes(), 0o755)
    with pytest.raises(Exception, match=r"usr/bin/program needs libc\.so\.6"):
        maker._check_libraries("mycel", tree)


def test_elf_reads_what_readelf_reads():
    for path in ("/bin/ls", os.path.realpath("/usr/bin/python3"), "/lib64/ld-linux-x86-64.so.2"):
        if not Path(path).exists():
            continue
        mine = elf.read(Path(path).read_bytes())
        theirs = subprocess.run(["readelf", "-dl", path], capture_output=True, text=True, check=True).stdout
        assert list(mine.needed) == re.findall(r"\(NEEDED\).*\[(.*)\]", theirs)
        assert mine.interpreter == "".join(re.findall(r"program interpreter: (.*)\]", theirs))
        assert mine.soname == "".join(re.findall(r"\(SONAME\).*\[(.*)\]", theirs))


def test_elf_says_what_is_broken():
    whole = Path("/bin/ls").read_bytes()
    for length in (0, 4, 63, 64, 100, 500):
        with pytest.raises(ValueError, match="ELF"):
            elf.read(whole[:length])


def test_headers_are_followed_to_the_end(tmp_path):
    """What is included is there, from where the compiler takes it first, and nothing besides."""
    whole = Tree()
    specific, common = "usr/src/linux-headers-6.9-amd64", "usr/src/linux-headers-6.9-common"
    for name in headers._BCC:
        folder = "arch/x86/include" if name.startswith("asm/") else "include"
        whole.add(f"{common}/{folder}/{name}", "")
    whole.add(f"{common}/include/linux/a.h", '#include <linux/b.h>\n # include "beside.h"\n')
    whole.add(
        f"{common}/include/linux/b.h",
        "#include <asm/gen.h>\n#include <linux/missing.h>\n#include <linux/a.h>\n",
    )
    whole.add(f"{common}/include/linux/beside.h", "")
    whole.add(f"{common}/include/linux/unused.h", "")
    whole.add(f"{specific}/arch/x86/include/generated/asm/gen.h", "")
    whole.add(f"{specific}/include/linux/b.h", "#include <asm/gen.h>\n#include <linux/a.h>\n/* generated */")
    source = tmp_path / "x.c"
    source.write_text("#include <linux/a.h>\n")
    found = headers.reachable(whole, "amd64", [source])
    names = {path.removeprefix(f"{headers.TARGET}/") for path in found.entries}
    expected = {
        "include/linux/a.h",
        "include/linux/b.h",
        "include/linux/beside.h",
        "arch/x86/include/generated/asm/gen.h",
    }
    assert expected <= names
    assert "include/linux/unused.h" not in names
    assert b"generated" in (found.entries[f"{headers.TARGET}/include/linux/b.h"].data or b"")
    with pytest.raises(headers.HeaderError, match="lack"):
        headers.reachable(Tree(), "amd64", [source])
