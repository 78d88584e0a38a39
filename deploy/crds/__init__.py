"""Custom resource definitions of the projects whose objects Mycel reads, for clusters that lack them."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable
from typing import Any

import yaml

from common.kubernetes import Client, path_of

PROJECTS = ("istio", "gateway-api", "linkerd", "smi")


def definitions(projects: Iterable[str]) -> list[dict[str, Any]]:
    """The definitions of these projects, by project and name.

    :raises ValueError: one that is none of :data:`PROJECTS`.
    """
    result: list[dict[str, Any]] = []
    for project in dict.fromkeys(projects):
        if project not in PROJECTS:
            raise ValueError(f"no definitions of {project!r}: one of {', '.join(PROJECTS)}")
        folder = importlib.resources.files("deploy.crds").joinpath(project)
        for file in sorted(folder.iterdir(), key=lambda f: f.name):
            if file.name.endswith(".yaml"):
                result.append(yaml.load(file.read_text("utf-8"), yaml.CSafeLoader))
    return result


async def missing(client: Client, projects: Iterable[str]) -> list[dict[str, Any]]:
    """Those of :func:`definitions` that the cluster has not, in whatever version and from whomever.

    :raises ValueError: as :func:`definitions`.
    :raises ApiError: definitions may not be listed.
    :raises Unreachable: the API server is away.
    """
    wanted = definitions(projects)
    there = await client.list(
        path_of("apiextensions.k8s.io/v1", "customresourcedefinitions"),
        accept="application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
    )
    names = {item["metadata"]["name"] for item in there["items"]}
    return [crd for crd in wanted if crd["metadata"]["name"] not in names]
