"""The definitions that we bring: accepted by a real API server, never over one that is there, all versions of TrafficSplit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from common.kubernetes import Access, ApiError, Client, path_of
from controlplane.source.kinds import BUILT_IN, CUSTOM
from deploy import crds, rbac
from lab.kubernetes import ControlPlane
from tests.source.conftest import install_definitions

DEFINITIONS = path_of("apiextensions.k8s.io/v1", "customresourcedefinitions")
SPLITS = "split.smi-spec.io"


def test_they_are_the_kinds_that_the_source_reads() -> None:
    there = {
        (d["spec"]["group"], d["spec"]["names"]["kind"], d["spec"]["names"]["plural"])
        for d in crds.definitions(crds.PROJECTS)
    }
    assert there == {(k.group, k.kind, k.plural) for k in CUSTOM}


def test_the_controller_may_read_what_the_source_reads() -> None:
    may = {
        (rule["apiGroups"][0], plural)
        for rule in rbac.rules("mycel-system")[0]["rules"]
        if rule["verbs"] == ["get", "list", "watch"]
        for plural in rule["resources"]
    }
    assert may == {
        *((k.group, k.plural) for k in (*BUILT_IN, *CUSTOM)),
        ("apiextensions.k8s.io", "customresourcedefinitions"),
    }


def test_a_project_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="no definitions of 'consul': one of istio, gateway-api"):
        crds.definitions(["consul"])


@pytest.mark.privileged
async def test_all_are_accepted_and_none_is_brought_twice(mesh_server: ControlPlane) -> None:
    async with Client(Access.load(mesh_server.kubeconfig)) as client:
        brought = await install_definitions(client, *crds.PROJECTS)
        assert len([n for n in brought if n.endswith(".gateway.networking.k8s.io")]) == 10
        assert await crds.missing(client, crds.PROJECTS) == []
        for definition in crds.definitions(crds.PROJECTS):
            there = await client.get(f"{DEFINITIONS}/{definition['metadata']['name']}")
            conditions = {c["type"]: c for c in there["status"]["conditions"]}
            assert conditions["NamesAccepted"]["status"] == "True"
            assert "NonStructuralSchema" not in conditions, definition["metadata"]["name"]
        name = "trafficsplits.split.smi-spec.io"
        await client.patch(f"{DEFINITIONS}/{name}", {"metadata": {"labels": {"theirs": "yes"}}})
        assert await crds.missing(client, ["smi"]) == []


def split(version: str, *weights: Any) -> dict[str, Any]:
    backends = [{"service": f"s{i}", "weight": w} for i, w in enumerate(weights)]
    return {
        "apiVersion": f"{SPLITS}/{version}",
        "kind": "TrafficSplit",
        "metadata": {"name": f"split-{version}"},
        "spec": {"service": "s", "backends": backends},
    }


@pytest.mark.privileged
async def test_every_version_of_traffic_split(mesh_server: ControlPlane) -> None:
    async with Client(Access.load(mesh_server.kubeconfig)) as client:
        written = [
            split("v1alpha1", "500m", "1", 2, "1.5"),
            *(split(v, 80, 20) for v in ("v1alpha2", "v1alpha3", "v1alpha4")),
        ]
        for body in written:
            await client.create(path_of(body["apiVersion"], "trafficsplits", "default"), body)
        for version in ("v1alpha1", "v1alpha2", "v1alpha3", "v1alpha4"):
            for body in written:
                path = path_of(f"{SPLITS}/{version}", "trafficsplits", "default", body["metadata"]["name"])
                assert (await client.get(path))["spec"] == body["spec"]
        for version, weight in (("v1alpha1", "much"), ("v1alpha1", True), ("v1alpha2", "500m")):
            body = split(version, weight)
            body["metadata"]["name"] = "wrong"
            with pytest.raises(ApiError, match=r"spec.backends\[0\].weight") as refused:
                await client.create(path_of(body["apiVersion"], "trafficsplits", "default"), body)
            assert refused.value.reason == "Invalid"
        await client.delete(path_of(f"{SPLITS}/v1alpha4", "trafficsplits", "default"))


@pytest.mark.privileged
async def test_older_smi_objects_keep_what_is_beside_their_spec(mesh_server: ControlPlane) -> None:
    body = {
        "apiVersion": "specs.smi-spec.io/v1alpha1",
        "kind": "HTTPRouteGroup",
        "metadata": {"name": "old"},
        "matches": [{"name": "metrics", "pathRegex": "/metrics", "methods": ["GET"]}],
    }
    async with Client(Access.load(mesh_server.kubeconfig)) as client:
        await client.create(path_of("specs.smi-spec.io/v1alpha1", "httproutegroups", "default"), body)
        path = path_of("specs.smi-spec.io/v1alpha4", "httproutegroups", "default", "old")
        assert (await client.get(path))["matches"] == body["matches"]
        await client.delete(path)


@pytest.mark.privileged
async def test_examples_of_gateway_api_and_smi_apply(mesh_server: ControlPlane, shared: Path) -> None:
    """Upstream's own examples, as a dry run."""
    async with Client(Access.load(mesh_server.kubeconfig)) as client:
        await install_definitions(client, *crds.PROJECTS)
    plurals = {(k.group, k.kind): k.plural for k in CUSTOM}
    count = 0
    async with Client(Access.load(mesh_server.kubeconfig)) as client:
        for file in sorted((shared / "conformance/gateway-api/examples/standard").rglob("*.yaml")):
            for body in yaml.safe_load_all(file.read_text()):
                if not body:
                    continue
                plural = plurals.get((body["apiVersion"].rpartition("/")[0], body["kind"]))
                if not plural:
                    continue
                namespace = "" if body["kind"] == "GatewayClass" else "default"
                body["metadata"].pop("namespace", None)
                await client.create(path_of(body["apiVersion"], plural, namespace), body, dryRun="All")
                count += 1
    assert count > 30
