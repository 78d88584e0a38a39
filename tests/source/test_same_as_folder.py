"""The same YAML gives the same snapshot from a folder and from the API: each seed file alone, beside the same applications."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.kubernetes import Access, Client, path_of
from controlplane.compiler import compile_snapshot, validate
from controlplane.model.snapshot import Snapshot
from controlplane.model.world import Settings
from controlplane.source import State
from controlplane.source.folder import Folder
from lab.kubernetes import ControlPlane
from tests.source.conftest import following

pytestmark = pytest.mark.privileged

#: The services that the seed files speak of, each with two versions.
APPLICATIONS = ("web-app", "reviews", "my-app", "webapp")
SEEDS = [f"{n:02}" for n in range(1, 14)]


async def applications(client: Client) -> None:
    """Services with pods that are ready; there is no kubelet, so that we say so."""
    for name in ("dev", "test", "prod"):
        await client.create(path_of("v1", "namespaces"), {"metadata": {"name": name}})
    labels = {"mycel.io/mesh": "enabled"}
    await client.patch(path_of("v1", "namespaces", name="default"), {"metadata": {"labels": labels}})
    await client.create(path_of("v1", "serviceaccounts", "default"), {"metadata": {"name": "default"}})
    for i, name in enumerate(APPLICATIONS):
        spec = {"selector": {"app": name}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}
        for service in (name, f"{name}-v1", f"{name}-v2"):
            await client.create(
                path_of("v1", "services", "default"), {"metadata": {"name": service}, "spec": spec}
            )
        for version in (1, 2):
            await pod(
                client, f"{name}-v{version}", {"app": name, "version": f"v{version}"}, f"10.1.{i}.{version}"
            )


async def pod(client: Client, name: str, labels: dict[str, str], address: str) -> None:
    path = path_of("v1", "pods", "default")
    container = {"name": "main", "image": "none.invalid/none:1"}
    spec = {"nodeName": "node-a", "automountServiceAccountToken": False, "containers": [container]}
    await client.create(path, {"metadata": {"name": name, "labels": labels}, "spec": spec})
    status = {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    await client.patch(f"{path}/{name}/status", {"status": status})


def snapshot_of(state: State) -> Snapshot:
    assert not state.faults
    return compile_snapshot(state.objects, Settings())


def findings(snapshot: Snapshot) -> set[Any]:
    return {replace(f, file="") for f in snapshot.findings}


def came(before: State, names: set[tuple[str, str]], state: State) -> bool:
    return {(k.kind, k.name) for k in state.objects.keys() - before.objects.keys()} == names


async def test_every_seed_file_alone(mesh_server: ControlPlane, shared: Path, tmp_path: Path) -> None:
    checked = []
    async with Client(Access.load(mesh_server.kubeconfig)) as client:
        await applications(client)
        async with following(client) as followed:
            count = 2 * len(APPLICATIONS)
            before = await followed.until(
                lambda s: (
                    sum(
                        k.kind == "Pod" and bool(o.manifest["status"].get("podIP"))
                        for k, o in s.objects.items()
                    )
                    == count
                )
            )
            for number in SEEDS:
                (seed,) = (shared / "seed-config").glob(f"{number}-*.yaml")
                mesh_server.kubectl("apply", "-f", seed)
                documents = [d for d in yaml.safe_load_all(seed.read_text()) if d]
                names = {(d["kind"], d["metadata"]["name"]) for d in documents}
                state = await followed.until(partial(came, before, names))
                folder = tmp_path / number
                folder.mkdir()
                (folder / "applications.yaml").write_text(
                    yaml.safe_dump_all([o.manifest for o in before.objects.values()])
                )
                (folder / seed.name).write_text(seed.read_text())
                from_api = snapshot_of(state)
                from_folder = snapshot_of(Folder(folder, validate).load())
                assert from_api.version == from_folder.version, seed.name
                assert findings(from_api) == findings(from_folder), seed.name
                checked.append(number)
                mesh_server.kubectl("delete", "-f", seed)
                await followed.until(lambda s: s.objects.keys() == before.objects.keys())
    assert checked == SEEDS


async def test_every_seed_file_applies_also_all_together(mesh_server: ControlPlane, shared: Path) -> None:
    files = sorted((shared / "seed-config").glob("*.yaml"))
    assert len(files) == len(SEEDS)
    for file in files:
        mesh_server.kubectl("apply", "-f", file)
    for file in files:
        assert "NotFound" not in mesh_server.kubectl("delete", "--ignore-not-found", "-f", file)
