"""What tests of the controller ask a real API server for: pods on nodes without kubelets, and their tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from common.kubernetes import Access, ApiError, Client

NAMESPACE = "mycel-system"


class Api:
    """A client of the API server as its administrator, with shorthands."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def make(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Create it, or take the one that is there."""
        try:
            return await self.client.create(path, body)
        except ApiError as e:
            if e.reason != "AlreadyExists":
                raise
            return await self.client.get(f"{path}/{body['metadata']['name']}")

    async def namespace(self, name: str, **labels: str) -> None:
        await self.make("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})

    async def node(self, name: str) -> None:
        await self.make("/api/v1/nodes", {"metadata": {"name": name}})

    async def account(self, name: str, namespace: str = NAMESPACE) -> None:
        await self.make(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}})

    async def pod(
        self, name: str, node: str, account: str, namespace: str = NAMESPACE, **metadata: Any
    ) -> dict[str, Any]:
        """A pod that is bound to a node; no kubelet runs it."""
        await self.namespace(namespace)
        await self.node(node)
        await self.account(account, namespace)
        body = {
            "metadata": {"name": name, **metadata},
            "spec": {
                "nodeName": node,
                "serviceAccountName": account,
                "automountServiceAccountToken": False,
                "containers": [{"name": "main", "image": "none.invalid/none:1"}],
                "terminationGracePeriodSeconds": 0,
            },
        }
        return await self.make(f"/api/v1/namespaces/{namespace}/pods", body)

    async def remove_pod(self, name: str, namespace: str = NAMESPACE) -> None:
        await self.client.delete(
            f"/api/v1/namespaces/{namespace}/pods/{name}",
            {"gracePeriodSeconds": 0, "propagationPolicy": "Background"},
        )

    async def token(
        self, pod: dict[str, Any] | None, account: str, audience: str = "mycel.io", namespace: str = NAMESPACE
    ) -> str:
        """A token of an account, bound to a pod as kubelet asks for it (None: bound to nothing).

        An empty ``audience`` is the API server's own.
        """
        spec: dict[str, Any] = {"expirationSeconds": 600} | ({"audiences": [audience]} if audience else {})
        if pod is not None:
            metadata = pod["metadata"]
            spec["boundObjectRef"] = {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": metadata["name"],
                "uid": metadata["uid"],
            }
        answer = await self.client.create(
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token", {"spec": spec}
        )
        return str(answer["status"]["token"])


@asynccontextmanager
async def connect(kubeconfig: Path) -> AsyncIterator[Api]:
    async with Client(Access.load(kubeconfig)) as client:
        yield Api(client)
