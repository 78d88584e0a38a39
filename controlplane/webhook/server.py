"""The webhook's HTTPS server (port 15017): bodies in, reviews out, within limits.

Anybody who reaches the port may ask: API servers show no certificate unless they are told to. So an answer tells nothing but
what is wrong with the object that was sent, and nobody can keep the controller busy: bodies and the time to read them are
limited, and few are judged at once.
"""

from __future__ import annotations

import asyncio
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
#: Bodies from here on are judged in a thread, so that nobody else waits.
_LARGE = 64 << 10
#: Requests judged at once, and those that may wait; more are refused.
_AT_ONCE = 2
_WAITING = 64
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
    ) -> None:
        self.registry = registry
        self._certificate = certificate
        self._validate = validate
        self._in_force = in_force
        self._judging = asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0
        self._tasks = Tasks()
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
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=90, shutdown_timeout=1.0)
        await self._runner.setup()
        host, _, port = address.rpartition(":")
        site = web.TCPSite(
            self._runner,
            host.strip("[]"),
            int(port),
            ssl_context=self._certificate.context,
            reuse_address=True,
        )
        try:
            await site.start()
        except OSError:
            await self._runner.cleanup()
            raise
        self.port = self._runner.addresses[0][1]
        self._tasks.start(self._renew(), name="webhook's certificate")
        _log.info("webhook serving", port=self.port)

    async def stop(self) -> None:
        await self._tasks.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_EVERY)
            try:
                self._certificate.renew()
            except Exception as e:
                # The old one is good for as long again.
                _log.exception("webhook's certificate cannot be renewed", e)

    async def _answer(self, request: web.Request) -> web.Response:
        if self._waiting >= _WAITING:
            return self._refuse(429, "busy", "too many requests at once")
        self._waiting += 1
        try:
            return await self._judge(request)
        finally:
            self._waiting -= 1

    async def _judge(self, request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(_READ_TIMEOUT):
                body = await request.read()
        except TimeoutError:
            return self._refuse(408, "slow", "the body took too long")
        except web.HTTPRequestEntityTooLarge:
            return self._refuse(413, "too_large", f"more than {MAX_BODY} bytes")
        began = time.monotonic()
        async with self._judging:
            try:
                if len(body) < _LARGE:
                    answer = self._review(body)
                else:
                    answer = await asyncio.to_thread(self._review, body)
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
