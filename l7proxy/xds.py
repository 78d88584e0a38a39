"""The ADS client: incremental, over one gRPC stream, ACK and NACK, for ever reconnecting.

Owns the stream: it subscribes to all of every type, and says at each start what it has already. What resources mean is
:mod:`l7proxy.resources`'s. The caller proves itself by a bearer credential, read anew for each stream, so that it may be rotated.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from envoy.config.core.v3 import base_pb2
from envoy.service.discovery.v3 import discovery_pb2

from common import logs
from common.channels import CLIENT_OPTIONS, first_answered
from l7proxy.model import Config
from l7proxy.resources import TYPES, Resources

_log = logs.get(__name__)

METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
_RETRY_FIRST = 0.2
_RETRY_LONGEST = 5.0
_INVALID_ARGUMENT = 3
_OPTIONS = (
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    *CLIENT_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
#: Seconds from a change until it is on disk: what comes together is written once.
_SAVE = 0.5


class XdsClient:
    """``publish`` is called with each new configuration, in the event loop."""

    def __init__(
        self,
        *,
        target: str,
        roots: Path,
        credential: Path,
        node: str,
        resources: Resources,
        publish: Callable[[Config], None],
        admin: str = "",
    ) -> None:
        """``admin`` is where this process serves its metrics, ``ADDRESS:PORT``; the controller tells ``mycel stat``."""
        self._target = target
        self._roots = roots
        self._credential = credential
        self._node = base_pb2.Node(id=f"l7proxy~{node}", user_agent_name="mycel-l7proxy")
        # A listener of its own for each chain: one that comes or goes is no reason to send all others again.
        metadata = {"NODE_NAME": node, "COMPONENT": "l7proxy", "ADMIN": admin, "LISTENERS": "by-chain"}
        self._node.metadata.update(metadata)
        self._resources = resources
        self._publish = publish
        self._unsaved: set[str] = set()
        self._call: Any = None
        self._rebuild: asyncio.TimerHandle | None = None
        self.connected = False
        self.nacks = 0
        self._answered: set[str] = set()  #: types of which this stream has brought something
        self.updates = 0

    @property
    def synced(self) -> bool:
        """What is here is the controller's of now, all of it: it sends listeners and routes once clusters are taken."""
        return self._answered.issuperset(TYPES)

    async def run(self) -> None:
        """Stay subscribed until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._save_now_and_then(), name="last good configuration")
            await self._follow()

    async def _follow(self) -> None:
        delay = _RETRY_FIRST
        quiet = False
        while True:
            before = self.updates
            try:
                await self._session()
                reason = "the stream ended"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            except OSError as error:
                reason = str(error)
            except Exception as error:
                # Without this client the configuration would stay as it is for ever.
                _log.exception("xDS session failed", error)
                reason = f"{type(error).__name__}: {error}"
            finally:
                self.connected = False
                self._answered.clear()
            if self.updates != before:
                delay, quiet = _RETRY_FIRST, False
            if not quiet:
                _log.warning(
                    "controller is away, the last good configuration stays",
                    target=self._target,
                    reason=reason,
                )
                quiet = True
            # Not all proxies of a cluster at once.
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, _RETRY_LONGEST)

    async def _session(self) -> None:
        credentials = grpc.ssl_channel_credentials(root_certificates=self._roots.read_bytes())
        token = self._credential.read_text().strip()
        async with first_answered(
            lambda: grpc.aio.secure_channel(self._target, credentials, options=_OPTIONS)
        ) as channel:
            method = channel.stream_stream(
                METHOD,
                request_serializer=discovery_pb2.DeltaDiscoveryRequest.SerializeToString,
                response_deserializer=discovery_pb2.DeltaDiscoveryResponse.FromString,
            )
            call = method(metadata=(("authorization", f"Bearer {token}"),))
            self._call = call
            for kind in TYPES:
                await call.write(
                    discovery_pb2.DeltaDiscoveryRequest(
                        node=self._node, type_url=kind, initial_resource_versions=self._resources.held(kind)
                    )
                )
            while True:
                response = await call.read()
                if response is grpc.aio.EOF:
                    # The status says why.
                    if await call.code() != grpc.StatusCode.OK:
                        _log.warning(
                            "xDS stream ended", code=(await call.code()).name, details=await call.details()
                        )
                    return
                if not self.connected:
                    self.connected = True
                    _log.info("controller connected", target=self._target)
                await self._on_response(response)

    async def _on_response(self, response: discovery_pb2.DeltaDiscoveryResponse) -> None:
        kind = response.type_url
        if kind not in TYPES:
            _log.warning("xDS response of a type that was not asked for", type=kind)
            return
        self.updates += 1
        self._answered.add(kind)
        items = [item.resource for item in response.resources]
        errors = self._resources.change(kind, response.system_version_info, items, response.removed_resources)
        self.publish()
        answer = discovery_pb2.DeltaDiscoveryRequest(type_url=kind, response_nonce=response.nonce)
        if errors:
            self.nacks += 1
            answer.error_detail.code = _INVALID_ARGUMENT
            answer.error_detail.message = "; ".join(errors)[:8192]
        await self._call.write(answer)
        self._unsaved.add(kind)

    async def _save_now_and_then(self) -> None:
        """The disk may be slow, and requests are waiting for this loop: it is written to in a thread."""
        try:
            while True:
                await asyncio.sleep(_SAVE)
                while self._unsaved:
                    kept = self._resources.kept(self._unsaved.pop())
                    await asyncio.to_thread(self._resources.write, kept)
        finally:
            for kind in self._unsaved:
                self._resources.save(kind)

    def publish(self) -> None:
        """Build and hand out the configuration; again a little later while something is warming."""
        self._publish(self._resources.build())
        if self._rebuild is not None:
            self._rebuild.cancel()
            self._rebuild = None
        if self._resources.warming:
            self._rebuild = asyncio.get_running_loop().call_later(1.0, self.publish)
