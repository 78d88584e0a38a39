"""``python -m deploy.images [build|lock|unpack]``: see :mod:`deploy.images`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from deploy.images.build import ROOT, Builder, BuildError, make_lock
from deploy.images.debian import DebianError, architecture
from deploy.images.headers import HeaderError
from deploy.images.plugin import PluginError
from deploy.images.python import PythonError


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MYCEL_CACHE") or Path(base, "mycel")) / "images"


def build(options: argparse.Namespace) -> None:
    builder = Builder(options.architecture, options.cache)
    for name in options.images or builder.contents["images"]:
        begin = time.monotonic()
        reference = f"{options.registry}/{name}:{options.tag or builder.version}"
        result = builder.image(name, options.output, reference)
        print(
            f"{reference}  {result.size / 1e6:.0f} MB  sha256:{result.digest[:16]}  {time.monotonic() - begin:.1f} s"
        )
        for built in result.layers:
            state = "cached" if built.cached else "built"
            print(
                f"  {built.layer.name:8} {built.layer.size / 1e6:7.1f} MB  {built.layer.digest[:16]}  {state}"
            )
        print(f"  {result.archive}, {result.archive.with_suffix('').name}.spdx.json beside it")


def unpack(options: argparse.Namespace) -> None:
    Builder(options.architecture, options.cache).unpack(options.output)


def lock(options: argparse.Namespace) -> None:
    print(make_lock(options.architecture, options.cache))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.images", description="Build the container images."
    )
    parser.add_argument("command", nargs="?", choices=("build", "lock", "unpack"), default="build")
    parser.add_argument("images", nargs="*", help="default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "build/images")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--architecture", help="Debian's name; default: this machine's")
    parser.add_argument("--registry", default="mycel.io", help="what stands before the image's name")
    parser.add_argument("--tag", help="default: the project's version")
    options = parser.parse_args()
    try:
        options.architecture = options.architecture or architecture()
        {"build": build, "lock": lock, "unpack": unpack}[options.command](options)
    except (BuildError, DebianError, HeaderError, PluginError, PythonError) as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
