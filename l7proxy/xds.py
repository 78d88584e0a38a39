"""The ADS client: state of the world over one gRPC stream, ACK and NACK, for ever reconnecting.

Owns the stream and the subscriptions (names, nonces); what resources mean is :mod:`l7proxy.resources`'s. The caller proves
itself by a bearer credential, read anew for each stream, so that it may be rotated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from envoy.config.core.v3 import base_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.rpc import status_pb2

from common import logs
from l7proxy.model import Config
from l7proxy.resources import CLUSTER, ENDPOINT, LISTENER, ROUTE, TYPES, Resources

_log = logs.get(__name__)

METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
_RETRY_FIRST = 0.2
_RETRY_LONGEST = 5.0
_INVALID_ARGUMENT = 3
_OPTIONS = (
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
#: The types whose subscription follows from another's resources.
_FOLLOWS = {CLUSTER: ENDPOINT, LISTENER: ROUTE}


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
        metadata = {"NODE_NAME": node, "COMPONENT": "l7proxy", "ADMIN": admin}
        self._node.metadata.update(metadata)
        self._resources = resources
        self._publish = publish
        self._nonces: dict[str, str] = {}
        self._names: dict[str, list[str]] = {}
        self._call: Any = None
        self._rebuild: asyncio.TimerHandle | None = None
        self.connected = False
        self.nacks = 0
        self.updates = 0

    async def run(self) -> None:
        """Stay subscribed until cancelled."""
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
            if self.updates != before:
                delay, quiet = _RETRY_FIRST, False
            if not quiet:
                _log.warning(
                    "controller is away, the last good configuration stays",
                    target=self._target,
                    reason=reason,
                )
                quiet = True
            await asyncio.sleep(delay)
            delay = min(delay * 2, _RETRY_LONGEST)

    async def _session(self) -> None:
        credentials = grpc.ssl_channel_credentials(root_certificates=self._roots.read_bytes())
        token = self._credential.read_text().strip()
        async with grpc.aio.secure_channel(self._target, credentials, options=_OPTIONS) as channel:
            method = channel.stream_stream(
                METHOD,
                request_serializer=discovery_pb2.DiscoveryRequest.SerializeToString,
                response_deserializer=discovery_pb2.DiscoveryResponse.FromString,
            )
            call = method(metadata=(("authorization", f"Bearer {token}"),))
            self._call = call
            self._nonces = {}
            self._names = {}
            for kind in TYPES:
                names = self._resources.wanted(kind)
                if names or kind not in _FOLLOWS.values():
                    await self._send(kind, names)
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

    async def _on_response(self, response: discovery_pb2.DiscoveryResponse) -> None:
        kind = response.type_url
        if kind not in TYPES:
            _log.warning("xDS response of a type that was not asked for", type=kind)
            return
        self.updates += 1
        self._nonces[kind] = response.nonce
        errors = self._resources.apply(kind, response.version_info, response.resources)
        self.publish()
        if errors:
            self.nacks += 1
            await self._send(kind, self._names.get(kind, []), error="; ".join(errors))
        else:
            await self._send(kind, self._names.get(kind, []))
        following = _FOLLOWS.get(kind)
        if following is not None:
            names = self._resources.wanted(following)
            if names != self._names.get(following):
                await self._send(following, names)
        # The disk may be slow, and requests are waiting for this loop. Nothing else changes the resources meanwhile.
        await asyncio.to_thread(self._resources.save, kind)

    async def _send(self, kind: str, names: list[str], error: str = "") -> None:
        self._names[kind] = names
        request = discovery_pb2.DiscoveryRequest(
            version_info=self._resources.versions[kind],
            node=self._node,
            resource_names=names,
            type_url=kind,
            response_nonce=self._nonces.get(kind, ""),
        )
        if error:
            request.error_detail.CopyFrom(status_pb2.Status(code=_INVALID_ARGUMENT, message=error[:8192]))
        await self._call.write(request)

    def publish(self) -> None:
        """Build and hand out the configuration; again a little later while something is warming."""
        self._publish(self._resources.build())
        if self._rebuild is not None:
            self._rebuild.cancel()
            self._rebuild = None
        if self._resources.warming:
            self._rebuild = asyncio.get_running_loop().call_later(1.0, self.publish)
