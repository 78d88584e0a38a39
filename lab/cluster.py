"""What an API server would hold: manifests in the controller's folder, each file replaced whole.

Knows how Kubernetes writes Namespace, ServiceAccount, Service and Pod, and nothing of what the controller makes of them.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lab.errors import LabError

#: Namespaces with this label are in the mesh (Istio's ambient label, as the configuration that users have says it).
MESH_LABEL = {"istio.io/dataplane-mode": "ambient"}


def ipv6_of(address: str) -> str:
    """The IPv6 address that goes with an IPv4 one of the lab: ``fd96::1:2`` with ``10.96.1.2``, where there is IPv6."""
    _, network, third, fourth = address.split(".")
    return str(ipaddress.ip_address(f"fd{network}::{int(third):x}:{int(fourth):x}"))


@dataclass
class PodRecord:
    """A pod as the cluster knows it."""

    namespace: str
    name: str
    node: str
    service_account: str
    labels: Mapping[str, str]
    owner: str = ""
    ports: Sequence[int] = ()
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    address: str = ""
    address6: str = ""
    ready: bool = False

    def manifest(self) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "name": self.name,
            "namespace": self.namespace,
            "uid": self.uid,
            "labels": dict(self.labels),
        }
        if self.owner:
            metadata["ownerReferences"] = [
                {
                    "apiVersion": "apps/v1",
                    "kind": "ReplicaSet",
                    "name": self.owner,
                    "uid": str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{self.namespace}/{self.owner}")),
                    "controller": True,
                }
            ]
        status: dict[str, Any] = {"phase": "Running" if self.address else "Pending"}
        if self.address:
            status["podIP"] = self.address
            status["podIPs"] = [{"ip": address} for address in (self.address, self.address6) if address]
        status["conditions"] = [{"type": "Ready", "status": "True" if self.ready else "False"}]
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": {
                "nodeName": self.node,
                "serviceAccountName": self.service_account,
                "containers": [
                    {"name": "app", "image": "lab", "ports": [{"containerPort": port} for port in self.ports]}
                ],
            },
            "status": status,
        }


class Cluster:
    """Writes the cluster's objects under ``folder/cluster`` and the users' files under ``folder/policies``.

    :param staging: a folder on the same file system that nobody watches; files are renamed from there.
    """

    def __init__(self, folder: Path, staging: Path, subnet: str = "10.96", *, ipv6: bool = False) -> None:
        self.objects = folder / "cluster"
        self.policies = folder / "policies"
        self._staging = staging
        self._subnet = subnet
        self._ipv6 = ipv6
        self._numbers = itertools.count(10)
        for path in (self.objects, self.policies, staging):
            path.mkdir(parents=True, exist_ok=True)

    def namespace(self, name: str, labels: Mapping[str, str] | None = None, *, mesh: bool = True) -> None:
        self.put(
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {
                    "name": name,
                    "labels": {
                        "kubernetes.io/metadata.name": name,
                        **(MESH_LABEL if mesh else {}),
                        **(labels or {}),
                    },
                },
            }
        )
        self.service_account(name, "default")

    def service_account(self, namespace: str, name: str) -> None:
        self.put(
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}}
        )

    def service(
        self,
        name: str,
        *,
        namespace: str,
        selector: Mapping[str, str],
        ports: Sequence[Mapping[str, Any]],
        address: str | None = None,
    ) -> str:
        """Write a Service and give back its cluster address (kept when it is written again)."""
        path = self._path("Service", namespace, name)
        if address is None:
            if path.exists():
                address = json.loads(path.read_text())["spec"]["clusterIP"]
            else:
                number = next(self._numbers)
                address = f"{self._subnet}.{number // 250}.{number % 250 + 1}"
        assert address is not None
        self.put(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name, "namespace": namespace},
                "spec": {
                    "type": "ClusterIP",
                    "clusterIP": address,
                    "clusterIPs": [address, ipv6_of(address)] if self._ipv6 else [address],
                    "selector": dict(selector),
                    "ports": [dict(port) for port in ports],
                },
            }
        )
        return address

    def put(self, manifest: Mapping[str, Any]) -> Path:
        """Write one object to its own file."""
        metadata = manifest["metadata"]
        path = self._path(manifest["kind"], metadata.get("namespace", ""), metadata["name"])
        self.write(path, json.dumps(manifest, indent=1))
        return path

    def remove(self, kind: str, namespace: str, name: str) -> None:
        self._path(kind, namespace, name).unlink(missing_ok=True)

    def apply(
        self, source: Path | str | Mapping[str, Any] | Sequence[Mapping[str, Any]], name: str = ""
    ) -> str:
        """Put a user's file in force: a path (its text as it is), a text, or objects. Gives back the file's name.

        :param name: file name without folder; by default that of the path, or of the first object.
        """
        if isinstance(source, Path):
            text, default = source.read_text(), source.name
        elif isinstance(source, str):
            text, default = source, ""
        else:
            objects = [source] if isinstance(source, Mapping) else list(source)
            text = yaml.safe_dump_all(objects, sort_keys=False)
            metadata = objects[0]["metadata"]
            default = (
                f"{objects[0]['kind'].lower()}-{metadata.get('namespace', 'default')}-{metadata['name']}.yaml"
            )
        file = name or default
        if not file or "/" in file:
            raise LabError(f"a text needs a plain file name, not {file!r}")
        self.write(self.policies / file, text)
        return file

    def withdraw(self, name: str) -> None:
        """Remove a user's file. :raises LabError: there is none of that name."""
        try:
            (self.policies / name).unlink()
        except FileNotFoundError:
            raise LabError(f"no file {name} in {self.policies}") from None

    def write(self, path: Path, text: str) -> None:
        temporary = self._staging / f"{uuid.uuid4().hex}"
        temporary.write_text(text)
        os.replace(temporary, path)

    def _path(self, kind: str, namespace: str, name: str) -> Path:
        return self.objects / f"{kind.lower()}-{namespace + '-' if namespace else ''}{name}.yaml"
