"""The webhook's HTTPS server (port 15017): bodies in, reviews out, within limits.

Anybody who reaches the port may ask: API servers show no certificate unless they are told to. So an answer tells nothing but
what is wrong with the object that was sent, and nobody can keep the controller busy or fill its memory: connections, bodies and
the time for each are limited, and few are judged at once.

A connection is for one request. API servers keep theirs for a minute and a half, and one that leads to a node that is gone, or
into a partition, costs the next ``kubectl apply`` the whole of its time limit; a handshake costs a few milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram

from common import logs
from common.tasks import Tasks
from controlplane.source import Validator
from controlplane.webhook.certificate import WebhookCertificate
from controlplane.webhook.review import MalformedReview, review

_log = logs.get(__name__)
PATH = "/validate"
#: Bytes of a request: the API server takes objects of 3 MB, and sends the old one beside the new one.
MAX_BODY = 7 << 20
#: Seconds in which a body has to be here (API servers wait 5 s for the answer).
_READ_TIMEOUT = 5.0
#: Seconds for a handshake, for a request's head after it, and for a client to agree that all is said.
_HANDSHAKE_TIMEOUT = 5.0
_HEAD_TIMEOUT = 5.0
_CLOSING_TIMEOUT = 1.0
#: Connections at once; each has buffers of a quarter of a megabyte. More are closed unheard.
_CONNECTIONS = 128
#: Bodies from here on are judged in a thread, so that nobody else waits, and one at a time: they can be thirty times as large
#: when they are decoded.
_LARGE = 64 << 10
#: Requests judged at once, and those that may wait, with all their bytes; more are refused.
_AT_ONCE = 2
_WAITING = 64
_WAITING_BYTES = 32 << 20
#: Seconds between looks at the certificate's age.
_RENEW_EVERY = 60.0


class WebhookServer:
    """Call :meth:`start`, then :meth:`stop`."""

    def __init__(
        self,
        certificate: WebhookCertificate,
        validate: Validator,
        registry: CollectorRegistry,
        in_force: Callable[[str, str], bool] = lambda group, kind: True,
        connections: int = _CONNECTIONS,
    ) -> None:
        self.registry = registry
        self._connections = connections
        self._certificate = certificate
        self._validate = validate
        self._in_force = in_force
        self._judging = asyncio.Semaphore(_AT_ONCE)
        self._judging_large = asyncio.Lock()
        self._waiting = 0
        self._waiting_bytes = 0
        self._tasks = Tasks()
        self._handshakes = Tasks()
        self._runner: web.AppRunner | None = None
        self.port = 0
        self._reviews = Counter(
            "mycel_controlplane_webhook_reviews",
            "Objects that the API server asked about.",
            ["answer"],
            registry=registry,
        )
        self._seconds = Histogram(
            "mycel_controlplane_webhook_seconds",
            "From a request's last byte to its answer.",
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
            registry=registry,
        )

    async def start(self, address: str) -> None:
        """Serve on ``ADDRESS:PORT`` (:attr:`port` says which, for port 0).

        :raises OSError: it cannot be bound.
        """
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_post(PATH, self._answer)
        host, _, port = address.rpartition(":")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server(
            (host.strip("[]"), int(port)), family=family, backlog=self._connections
        )
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._runner = web.AppRunner(
            app,
            access_log=None,
            keepalive_timeout=_HEAD_TIMEOUT,
            lingering_time=_CLOSING_TIMEOUT,
            shutdown_timeout=_CLOSING_TIMEOUT,
        )
        await self._runner.setup()
        self._tasks.start(self._accept(listener), name="webhook's connections")
        self._tasks.start(self._renew(), name="webhook's certificate")
        _log.info("webhook serving", port=self.port)

    async def stop(self) -> None:
        await self._tasks.cancel()
        await self._handshakes.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _accept(self, listener: socket.socket) -> None:
        assert self._runner is not None and self._runner.server is not None
        loop, server = asyncio.get_running_loop(), self._runner.server
        with listener:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError as e:
                    _log.warning("webhook cannot accept", error=e.strerror)
                    await asyncio.sleep(0.1)
                    continue
                if len(self._handshakes) + len(server.connections) >= self._connections:
                    self._reviews.labels("busy").inc()
                    connection.close()
                else:
                    self._handshakes.start(self._handshake(connection, server), name="webhook's handshake")

    async def _handshake(self, connection: socket.socket, server: web.Server) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                server,
                connection,
                ssl=self._certificate.context,
                ssl_handshake_timeout=_HANDSHAKE_TIMEOUT,
                ssl_shutdown_timeout=_CLOSING_TIMEOUT,
            )
        except OSError as e:
            _log.debug("webhook's handshake failed", error=str(e))

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_EVERY)
            try:
                self._certificate.renew()
            except Exception as e:
                # The old one is good for as long again.
                _log.exception("webhook's certificate cannot be renewed", e)

    async def _answer(self, request: web.Request) -> web.Response:
        size = MAX_BODY if request.content_length is None else request.content_length
        if size > MAX_BODY:
            response = self._refuse(413, "too_large", f"more than {MAX_BODY} bytes")
        elif self._waiting >= _WAITING or self._waiting_bytes + size > _WAITING_BYTES:
            response = self._refuse(429, "busy", "too many requests at once")
        else:
            self._waiting += 1
            self._waiting_bytes += size
            try:
                response = await self._judge(request)
            finally:
                self._waiting -= 1
                self._waiting_bytes -= size
        response.force_close()
        return response

    async def _judge(self, request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(_READ_TIMEOUT):
                body = await request.read()
        except TimeoutError:
            return self._refuse(408, "slow", "the body took too long")
        except ConnectionError:
            return self._refuse(400, "malformed", "the connection ended within the body")
        except web.HTTPRequestEntityTooLarge:
            return self._refuse(413, "too_large", f"more than {MAX_BODY} bytes")
        began = time.monotonic()
        large = len(body) >= _LARGE
        async with self._judging_large if large else contextlib.nullcontext(), self._judging:
            try:
                answer = await asyncio.to_thread(self._review, body) if large else self._review(body)
            except (MalformedReview, msgspec.DecodeError, RecursionError) as e:
                return self._refuse(400, "malformed", str(e))
        self._seconds.observe(time.monotonic() - began)
        response = answer["response"]
        self._reviews.labels("allowed" if response["allowed"] else "refused").inc()
        if not response["allowed"]:
            _log.info("object refused", reason=response["status"]["message"])
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    def _review(self, body: bytes) -> dict[str, Any]:
        return review(msgspec.json.decode(body), self._validate, self._in_force)

    def _refuse(self, status: int, answer: str, reason: str) -> web.Response:
        self._reviews.labels(answer).inc()
        _log.warning("webhook request refused", status=status, reason=reason)
        return web.Response(status=status, text=reason)
