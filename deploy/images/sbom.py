"""The bill of materials beside each image: SPDX 2.3 in JSON, the same bytes for the same image."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from deploy.images.debian import Package
from deploy.images.python import Distribution


@dataclass(frozen=True)
class Materials:
    """What an image is made of."""

    debian: list[Package]
    python: list[Distribution]


def document(
    image: str, version: str, architecture: str, manifest: str, created: str, materials: Materials
) -> bytes:
    """``manifest`` is the image's digest in hexadecimal."""
    packages = [
        _package(
            "image", image, version, "NOASSERTION", f"pkg:oci/{image}@sha256%3A{manifest}?arch={architecture}",
            checksum=manifest, purpose="CONTAINER",
        ),
        _package("mycel", "mycel", version, "Apache-2.0", f"pkg:pypi/mycel@{quote(version)}"),
    ]  # fmt: skip
    for one in materials.debian:
        packages.append(
            _package(
                f"debian-{one.name}",
                one.name,
                one.version,
                "NOASSERTION",
                f"pkg:deb/debian/{quote(one.name)}@{quote(one.version)}?arch={one.architecture}",
                checksum=one.sha256,
                source=f"Debian source package {one.source}",
            )
        )
    for python in materials.python:
        name = re.sub(r"[-_.]+", "-", python.name).lower()
        packages.append(
            _package(
                f"python-{name}",
                python.name,
                python.version,
                python.license,
                f"pkg:pypi/{quote(name)}@{quote(python.version)}",
            )
        )
    relations = [
        {
            "spdxElementId": "SPDXRef-DOCUMENT",
            "relationshipType": "DESCRIBES",
            "relatedSpdxElement": _id("image"),
        }
    ]
    relations += [
        {
            "spdxElementId": _id("image"),
            "relationshipType": "CONTAINS",
            "relatedSpdxElement": package["SPDXID"],
        }
        for package in packages[1:]
    ]
    whole = {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"{image}-{version}-{architecture}",
        "documentNamespace": f"https://mycel.io/spdx/{image}-{manifest}",
        "creationInfo": {"created": created, "creators": ["Tool: mycel-images"]},
        "packages": packages,
        "relationships": relations,
    }
    return json.dumps(whole, indent=1).encode() + b"\n"


def _package(
    key: str,
    name: str,
    version: str,
    licence: str,
    url: str,
    *,
    checksum: str = "",
    source: str = "",
    purpose: str = "",
) -> dict[str, Any]:
    package: dict[str, Any] = {
        "SPDXID": _id(key),
        "name": name,
        "versionInfo": version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": False,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": licence,
        "copyrightText": "NOASSERTION",
        "externalRefs": [
            {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": url}
        ],
    }
    if checksum:
        package["checksums"] = [{"algorithm": "SHA256", "checksumValue": checksum}]
    if source:
        package["sourceInfo"] = source
    if purpose:
        package["primaryPackagePurpose"] = purpose
    return package


def _id(key: str) -> str:
    return "SPDXRef-" + re.sub(r"[^A-Za-z0-9.]", "-", key)
