"""The controller on Kubernetes: what a :class:`~controlplane.controller.Controller` stands on there, and what a leader does.

Owns the order of the start: the root first, then the objects; nothing is served before both are there, because a client takes
what it is served for all that there is.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from common import logs
from common.kubernetes import Access, ApiError, Client, Unreachable, path_of
from common.tasks import Tasks
from controlplane import controller as folder
from controlplane.ca.secret import PublicRoots, SharedRoot
from controlplane.compiler import is_compiled, validate
from controlplane.controller import Backing, Controller
from controlplane.leader import Leader
from controlplane.model.kubernetes import CLUSTER_DOMAIN
from controlplane.source import Key, Object
from controlplane.source.kubernetes import KubernetesSource
from controlplane.source.lastgood import LastGood
from controlplane.status.board import Member
from controlplane.status.conditions import GATEWAY_API
from controlplane.status.kinds import CONTROLLER
from controlplane.status.replicas import COMPONENTS, Peers
from controlplane.status.writer import StatusWriter
from controlplane.tokens import ACCOUNT_PREFIX, TokenReviewCredentials
from controlplane.webhook import Registration, WebhookServer
from controlplane.webhook.certificate import WebhookCertificate

_log = logs.get(__name__)
SERVICE = "mycel-controlplane"


@dataclass(frozen=True)
class Options:
    """What the command line says beside :class:`controlplane.controller.Options`."""

    namespace: str
    replica: str
    credential: Path
    kubeconfig: Path | None = None
    webhook: str | None = None


async def run(options: folder.Options, cluster: Options, stop: asyncio.Event) -> None:
    """Serve until ``stop`` is set.

    :raises AccessError: nobody says where the API server is.
    :raises AuthorityError: the root is broken.
    :raises OSError: an address cannot be bound, or the state folder not be written.
    """
    serving = asyncio.ensure_future(_serve(options, cluster))
    stopping = asyncio.ensure_future(stop.wait())
    # A stop counts while the root or the objects are waited for, too.
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving


async def _serve(options: folder.Options, cluster: Options) -> None:
    """Serve until cancelled."""
    options.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            Client(Access.load(cluster.kubeconfig), user_agent="mycel-controlplane")
        )
        root = SharedRoot(client, cluster.namespace, options.state / "ca")
        authority = await root.open()
        names = (*options.server_names, *await _names(client, cluster.namespace))
        registry = CollectorRegistry()
        source = KubernetesSource(client, validate, LastGood(options.state / "last-good.json"), registry)
        view = _View(cluster)
        credentials = TokenReviewCredentials(
            client, cluster.namespace, view.find_pod, options.state / "issuer.json"
        )
        controller = view.controller = Controller(
            replace(options, server_names=tuple(dict.fromkeys(names))),
            Backing(source, authority, credentials, lambda: source.ready, view.members),
            registry,
        )
        peers = Peers(
            lambda: view.replicas(controller.port),
            authority.roots_pem.encode(),
            f"{SERVICE}.{cluster.namespace}.svc",
            cluster.credential,
        )
        controller.status.ask = peers.ask
        stack.push_async_callback(peers.close)
        public = PublicRoots(client, cluster.namespace, authority.roots_pem)
        writer = StatusWriter(
            client, controller.status, cluster.replica, view.own_parent, view.own_gateway, registry
        )

        if cluster.webhook:
            certificate = WebhookCertificate(authority, names)
            webhook = WebhookServer(certificate, validate, registry, is_compiled)
            await webhook.start(cluster.webhook)
            stack.push_async_callback(webhook.stop)

        async def lead() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(public.keep(), name="roots")
                group.create_task(writer.run(), name="status-writer")
                if cluster.webhook:
                    registration = Registration(client, authority.roots_pem)
                    group.create_task(registration.keep(), name="webhook-registration")

        leader = Leader(client, cluster.namespace, cluster.replica, lead, registry)
        tasks = Tasks()
        await controller.start()
        stack.push_async_callback(controller.stop)
        # Ended first: who leads gives the lease up while all else still works.
        stack.push_async_callback(tasks.cancel)
        tasks.start(credentials.follow_keys(), name="issuer-keys")
        tasks.start(root.watch(authority), name="root")
        tasks.start(leader.run(), name="leader")
        await asyncio.get_running_loop().create_future()


class _View:
    """Our own pods and Gateways, as the objects in force show them."""

    def __init__(self, cluster: Options) -> None:
        self._cluster = cluster
        self.controller: Controller | None = None
        self._read: object = None
        self._ours: list[tuple[str, str, Mapping[str, Any]]] = []

    @property
    def _objects(self) -> Mapping[Key, Object]:
        return self.controller.objects if self.controller else {}

    def find_pod(self, namespace: str, name: str) -> Mapping[str, Any] | None:
        """A pod's manifest."""
        pod = self._objects.get(Key("", "Pod", namespace, name))
        return pod.manifest if pod else None

    def members(self) -> list[Member]:
        """(node, component) of whom a policy has to reach: our pods that run, and the agent wherever a pod is in the mesh.

        While an agent is replaced, or has gone for good, its node's kernel judges by what it had.
        """
        found = {
            (pod["spec"]["nodeName"], component)
            for _, component, pod in self._pods()
            if component in COMPONENTS
        }
        workloads = self.controller.snapshot.workloads.values() if self.controller else ()
        found.update((w.node, "agent") for w in workloads if w.enrolled and w.addresses and w.node)
        return [(node, component) for node, component in found if Key("", "Node", "", node) in self._objects]

    def replicas(self, port: int) -> dict[str, str]:
        """Name and ``ADDRESS:PORT`` of every other controller."""
        result = {}
        for name, component, pod in self._pods():
            address = (pod.get("status") or {}).get("podIP")
            if component == "controlplane" and name != self._cluster.replica and address:
                result[name] = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        return result

    def _pods(self) -> list[tuple[str, str, Mapping[str, Any]]]:
        """(name, component, manifest) of our pods that run and are not going."""
        objects = self._objects
        if self._read is not objects:
            found = []
            for key, pod in objects.items():
                if key.kind != "Pod" or key.group or key.namespace != self._cluster.namespace:
                    continue
                manifest = pod.manifest
                account = pod.spec.get("serviceAccountName") or ""
                running = (manifest.get("status") or {}).get("phase") == "Running" and pod.spec.get(
                    "nodeName"
                )
                going = "deletionTimestamp" in manifest["metadata"]
                if account.startswith(ACCOUNT_PREFIX) and running and not going:
                    found.append((key.name, account.removeprefix(ACCOUNT_PREFIX), manifest))
            self._ours, self._read = found, objects
        return self._ours

    def own_gateway(self, manifest: Mapping[str, Any]) -> bool:
        """True for our GatewayClass, and Gateways of it."""
        spec = manifest.get("spec") or {}
        if manifest["kind"] == "GatewayClass":
            return bool(spec.get("controllerName") == CONTROLLER)
        of = self._objects.get(Key(GATEWAY_API, "GatewayClass", "", spec.get("gatewayClassName") or ""))
        return of is not None and bool(of.spec.get("controllerName") == CONTROLLER)

    def own_parent(self, ref: Mapping[str, Any], namespace: str) -> bool:
        """True if a route's parent is a Service (GAMMA), or a Gateway of ours."""
        group, kind = ref.get("group", GATEWAY_API), ref.get("kind", "Gateway")
        if (group, kind) in (("", "Service"), ("core", "Service")):
            return True
        if (group, kind) == (GATEWAY_API, "Gateway"):
            gateway = self._objects.get(
                Key(GATEWAY_API, "Gateway", ref.get("namespace") or namespace, ref.get("name") or "")
            )
            return gateway is not None and self.own_gateway(gateway.manifest)
        return bool(group == "policy.linkerd.io")


async def _names(client: Client, namespace: str) -> tuple[str, ...]:
    """What the controller's Service is called: DNS names, and its cluster addresses if they are to be had."""
    names = [SERVICE + suffix for suffix in ("", f".{namespace}", f".{namespace}.svc")]
    names.append(f"{names[-1]}.{CLUSTER_DOMAIN}")
    addresses: list[str] = []
    try:
        async with asyncio.timeout(2.0):
            service = await client.get(path_of("v1", "services", namespace, SERVICE))
        addresses = [a for a in (service.get("spec") or {}).get("clusterIPs") or () if a != "None"]
    except (ApiError, Unreachable, TimeoutError) as e:
        _log.warning("address of the controller's Service is not known", error=str(e) or type(e).__name__)
        # kubelet says so too, if the Service was there before this pod.
        addresses = [a for a in [os.environ.get("MYCEL_CONTROLPLANE_SERVICE_HOST")] if a]
    return (*names, *addresses)
