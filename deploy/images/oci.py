"""OCI archives: layers, configuration, manifest and index (image-spec 1.1) in one tar file for ``ctr``, podman and docker.

Layers are not compressed: their bytes then depend on nothing but their files, nodes unpack them faster, and whoever pushes
an image compresses it on the way.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.images.tree import digest

#: Debian's architecture: what the image specification calls it (GOARCH), and its variant.
PLATFORM = {
    "amd64": ("amd64", ""), "arm64": ("arm64", "v8"), "armhf": ("arm", "v7"), "i386": ("386", ""), "ppc64el": ("ppc64le", ""),
    "riscv64": ("riscv64", ""), "s390x": ("s390x", ""),
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A finished layer: ``file`` is a tar archive, ``digest`` its sha256 in hexadecimal, ``size`` its length in bytes."""

    name: str
    file: Path
    digest: str
    size: int


@dataclass(frozen=True)
class Image:
    reference: str
    architecture: str
    created: str
    user: str
    command: list[str]
    environment: dict[str, str]
    layers: list[Layer]
    labels: dict[str, str] = field(default_factory=dict)


def write(image: Image, target: Path) -> str:
    """Write the archive whole or not at all; gives the manifest's digest, by which a registry would know the image."""
    architecture, variant = PLATFORM[image.architecture]
    platform = {"architecture": architecture, "os": "linux"} | ({"variant": variant} if variant else {})
    configuration = _json(
        {
            "created": image.created,
            **platform,
            "config": {
                "User": image.user,
                "Env": [f"{name}={value}" for name, value in sorted(image.environment.items())],
                "Cmd": image.command,
                "WorkingDir": "/",
                "Labels": image.labels,
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.digest}" for layer in image.layers]},
            "history": [
                {"created": image.created, "created_by": f"layer {layer.name}"} for layer in image.layers
            ],
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor(
                "application/vnd.oci.image.config.v1+json", digest(configuration), len(configuration)
            ),
            "layers": [
                _descriptor("application/vnd.oci.image.layer.v1.tar", layer.digest, layer.size)
                for layer in image.layers
            ],
        }
    )
    name, _, tag = image.reference.rpartition(":")
    index = _json(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [
                {
                    **_descriptor(
                        "application/vnd.oci.image.manifest.v1+json", digest(manifest), len(manifest)
                    ),
                    "platform": platform,
                    "annotations": {
                        "io.containerd.image.name": f"{name}:{tag}",
                        "org.opencontainers.image.ref.name": tag,
                    },
                }
            ],
        }
    )
    # What docker load reads before it knew of OCI archives; it points to the same blobs.
    docker = _json(
        [
            {
                "Config": f"blobs/sha256/{digest(configuration)}",
                "RepoTags": [image.reference],
                "Layers": [f"blobs/sha256/{layer.digest}" for layer in image.layers],
            }
        ]
    )
    # Several builds may go on at once, in one checkout too.
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    with tarfile.open(aside, "w", format=tarfile.PAX_FORMAT) as archive:
        _add(archive, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _add(archive, "index.json", index)
        _add(archive, "manifest.json", docker)
        for data in (manifest, configuration):
            _add(archive, f"blobs/sha256/{digest(data)}", data)
        for layer in image.layers:
            with layer.file.open("rb") as file:
                info = tarfile.TarInfo(f"blobs/sha256/{layer.digest}")
                info.size, info.mode = layer.size, 0o644
                archive.addfile(info, file)
    aside.rename(target)
    return digest(manifest)


def _descriptor(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": size}


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    archive.addfile(info, io.BytesIO(data))
