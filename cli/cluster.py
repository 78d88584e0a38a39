"""A Kubernetes cluster as commands see it: synchronous requests, and our processes' admin servers behind the API server.

Owns the thread that speaks to the API server, and which pod an admin address belongs to. An admin server is reached through
the API server's proxy to its pod, so that nobody needs a route to pods, only the right to ``pods/proxy`` in our namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from cli.http import Refused, Unreachable, decode
from common import kubernetes
from common.kubernetes import Access, AccessError, ApiError, Client, path_of
from deploy import crds, parts

Json = dict[str, Any]
T = TypeVar("T")

#: Seconds until a watch that broke is tried again.
_AGAIN = 0.5


class NoCluster(Exception):
    """There is no kubeconfig, or it does not lead to a cluster. The text is for people."""


class Cluster:
    """Use as a context manager. All methods may be called from any thread.

    :raises NoCluster: on entering, when there is no way to an API server.
    """

    def __init__(self, namespace: str, *, kubeconfig: Path | None = None, context: str | None = None) -> None:
        self.namespace = namespace
        self._kubeconfig, self._context = kubeconfig, context
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="api server", daemon=True)
        self._pods: dict[str, Json] = {}

    def __enter__(self) -> Self:
        try:
            access = Access.load(self._kubeconfig, self._context)
        except AccessError as error:
            raise NoCluster(str(error)) from error
        self.server = access.server
        self._client = Client(access, user_agent="mycel")
        self._thread.start()
        self.run(self._client.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._client.__aexit__())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine of the client's gives.

        :raises Unreachable: the API server does not answer.
        :raises ApiError: it refuses.
        """
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except kubernetes.Unreachable as error:
            raise Unreachable(f"the API server at {self.server} does not answer: {error}") from error

    def get(self, path: str, **params: Any) -> Json:
        return self.run(self._client.get(path, **params))

    def find(self, path: str, **params: Any) -> Json | None:
        """As :meth:`get`, None for what is not there (404)."""
        try:
            return self.get(path, **params)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def all(self, path: str, **params: Any) -> list[Json]:
        """The items of a collection; none when its kind is not there."""
        try:
            return list(self.run(self._client.list(path, **params))["items"])
        except ApiError as error:
            if error.status == 404:
                return []
            raise

    def create(self, path: str, body: Mapping[str, Any], **params: Any) -> Json:
        return self.run(self._client.create(path, body, **params))

    def patch(self, path: str, body: Mapping[str, Any], **params: Any) -> Json:
        return self.run(self._client.patch(path, body, **params))

    def apply(self, path: str, body: Mapping[str, Any], *, manager: str, force: bool = False) -> Json:
        """Server-side apply."""
        return self.run(self._client.apply(path, body, manager, force=force))

    def delete(self, path: str, **options: Any) -> bool:
        """Delete, whether or not it is there; ``options`` are DeleteOptions. Whether it was there."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", **options}
        try:
            self.run(self._client.delete(path, body))
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    @contextmanager
    def watching(self, path: str, seen: Callable[[Json, bool], object], **params: Any) -> Iterator[None]:
        """``seen`` is told of each object of a collection and of each change, with True of an object's last state: it is gone.

        From another thread, and on until the context is left, also over interruptions.

        :raises Unreachable: the API server does not answer at the beginning.
        :raises ApiError: it refuses at the beginning.
        """
        opened = threading.Event()
        task = asyncio.run_coroutine_threadsafe(self._follow(path, seen, opened, params), self._loop)
        task.add_done_callback(lambda _: opened.set())
        opened.wait()
        if task.done():
            task.result()
        try:
            yield
        finally:
            task.cancel()

    async def _follow(
        self, path: str, seen: Callable[[Json, bool], object], opened: threading.Event, params: dict[str, Any]
    ) -> None:
        while True:
            try:
                there = await self._client.list(path, **params)
                for one in there["items"]:
                    seen(one, False)
                version = there["metadata"]["resourceVersion"]
                opened.set()
                async with contextlib.aclosing(
                    self._client.watch(path, resourceVersion=version, **params)
                ) as events:
                    async for event in events:
                        if event["type"] != "BOOKMARK":
                            seen(event["object"], event["type"] == "DELETED")
            except (kubernetes.Unreachable, ApiError) as error:
                if not opened.is_set():
                    if isinstance(error, ApiError):
                        raise
                    raise Unreachable(f"the API server at {self.server} does not answer: {error}") from error
                await asyncio.sleep(_AGAIN)

    def missing_definitions(self, projects: Iterable[str]) -> list[Json]:
        """Definitions of these projects that the cluster has not. :raises ValueError: a project that is none."""
        return self.run(crds.missing(self._client, projects))

    def pods(self, component: str = "") -> list[Json]:
        """Our pods, of one component (``mycel-agent``) or all, that have not ended."""
        selector = parts.selector(component) if component else {"app.kubernetes.io/name": "mycel"}
        text = ",".join(f"{name}={value}" for name, value in selector.items())
        found = self.all(path_of("v1", "pods", self.namespace), labelSelector=text)
        return [pod for pod in found if pod["status"].get("phase") not in ("Succeeded", "Failed")]

    def admin_of(self, pod: Json, port: int) -> str:
        """The admin address of a pod's process, ``HOST:PORT``; :meth:`read_text` knows it from then on."""
        address = f"{pod['status'].get('podIP', pod['metadata']['name'])}:{port}"
        self._pods[address] = pod
        return address

    def know_admins(self) -> None:
        """Learn which admin address is which pod's."""
        ports = {
            "agent": parts.AGENT_ADMIN,
            "nodeproxy": parts.NODEPROXY_ADMIN,
            "l7proxy": parts.L7PROXY_ADMIN,
            "controlplane": parts.CONTROLPLANE_ADMIN,
        }
        for pod in self.pods():
            component = pod["metadata"]["labels"].get("app.kubernetes.io/component", "")
            if component in ports:
                self.admin_of(pod, ports[component])

    def read_text(self, address: str, path: str, *, who: str) -> str:
        """What the admin server at ``address`` serves, through the API server.

        :raises Unreachable: no pod of ours has this address, it does not answer, or answers with an error.
        """
        pod = self._pods.get(address)
        if pod is None:
            raise Unreachable(f"{who} at {address} is no pod of ours that runs")
        name, port = pod["metadata"]["name"], address.rpartition(":")[2]
        url = path_of("v1", "pods", self.namespace, f"http:{name}:{port}", "proxy") + path
        try:
            return self.run(self._client.get_text(url))
        except ApiError as error:
            said = error.message.strip().partition("\n")[0]
            if error.status == 403:
                said += "; this needs the right to get pods/proxy"
            message = f"{who} ({name}) answers {path} with {error.status}: {said}"
            raise Refused(message, error.status, said) from error

    def read_json(self, address: str, path: str, *, who: str) -> Any:
        """As :meth:`read_text`, decoded. :raises Unreachable: also when the answer is no JSON."""
        return decode(self.read_text(address, path, who=who), address, path, who=who)
