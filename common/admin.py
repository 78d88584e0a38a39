"""The admin HTTP server of every process: metrics, readiness, log levels and debug pages.

Owns a thread of its own, so that it answers while the event loop is busy, which is when it is needed. It owns no
metrics and no state: the registry and the functions that answer are passed in, and are called in this server's
threads. It is not made for untrusted networks: no TLS, and what changes something is for loopback peers only.

=====================  ====================================================================================
GET /metrics           the registry, in Prometheus' text format or OpenMetrics
GET /healthz/ready     200, or 503 with the reason
GET /logging           levels by logger
POST /logging?level=   ``debug``, or ``agent.cni:debug`` (loopback peers only)
=====================  ====================================================================================
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from common import logs

_log = logs.get(__name__)

#: Requests at one time, so that a scraper gone wild takes no memory from the process. With more, whoever has not asked for
#: anything yet gives way, the first one first, else the new one: nobody keeps kubelet's probe out by saying nothing.
_MAX_REQUESTS = 16
#: Seconds for a client that gives way to be gone.
_GIVING_WAY = 1.0
#: Seconds that a client may take to send its request or to take its answer.
_CLIENT_TIMEOUT = 10.0

_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"


class BadQueryError(ValueError):
    """A page's parameters are not to be understood; the message says why, and is the answer (400)."""


class Answer(NamedTuple):
    """What goes back to the client."""

    status: HTTPStatus
    content_type: str
    body: bytes


class AdminServer:
    """Serves from :meth:`start` until :meth:`close`; also a context manager. The socket is bound when it is made."""

    def __init__(
        self,
        address: str,
        port: int,
        *,
        registry: CollectorRegistry,
        ready: Callable[[], bool | str],
        json: Mapping[str, Callable[[], object]] | None = None,
        queries: Mapping[str, Callable[[Mapping[str, str]], object]] | None = None,
    ) -> None:
        """Bind ``address`` (IPv4 or IPv6) and ``port`` (0 for any free one).

        ``ready`` returns True, or False or the reason why not. ``json`` holds further pages by path; what a function
        returns is encoded by msgspec, and unknown types by their ``str``. A page that is in ``queries`` is answered from
        there when it is asked with parameters (each name once), or is not in ``json``; those functions may raise BadQueryError.

        :raises OSError: the address cannot be bound.
        """
        self._registry = registry
        self._ready = ready
        self._json = dict(json or {})
        self._queries = dict(queries or {})
        self._server = _Server(address, port, self)
        self._thread = threading.Thread(target=self._server.serve, name="admin", daemon=True)

    @property
    def port(self) -> int:
        """The port that is bound."""
        return int(self._server.socket.getsockname()[1])

    def start(self) -> Self:
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop listening and end the thread; a request that is being answered may still finish."""
        self._server.stop()
        if self._thread.ident is not None:
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def answer(self, method: str, target: str, *, accept: str, from_loopback: bool) -> Answer:
        """What a request gets; no I/O here."""
        url = urlsplit(target)
        if method == "POST":
            if url.path != "/logging":
                return _text(HTTPStatus.METHOD_NOT_ALLOWED, "only /logging takes a POST")
            if not from_loopback:
                return _text(HTTPStatus.FORBIDDEN, "log levels are changed from this host only")
            try:
                logs.set_levels(parse_qs(url.query).get("level", [""])[-1])
            except logs.LevelError as error:
                return _text(HTTPStatus.BAD_REQUEST, str(error))
            _log.info("log levels changed", levels=logs.levels())
            return _as_json(logs.levels())
        match url.path:
            case "/metrics":
                encode, content_type = choose_encoder(accept)
                return Answer(HTTPStatus.OK, content_type, encode(self._registry))
            case "/healthz/ready":
                ready = self._ready()
                if ready is True:
                    return _text(HTTPStatus.OK, "ready")
                return _text(HTTPStatus.SERVICE_UNAVAILABLE, ready or "not ready")
            case "/logging":
                return _as_json(logs.levels())
            case path if path in self._queries and (url.query or path not in self._json):
                given = parse_qs(url.query, keep_blank_values=True)
                if twice := [name for name, values in given.items() if len(values) > 1]:
                    return _text(HTTPStatus.BAD_REQUEST, f"{twice[0]}: given more than once")
                try:
                    found = self._queries[path]({name: values[0] for name, values in given.items()})
                except BadQueryError as error:
                    return _text(HTTPStatus.BAD_REQUEST, str(error))
                return _as_json(found)
            case path if path in self._json:
                return _as_json(self._json[path]())
            case _:
                pages = ["/metrics", "/healthz/ready", "/logging", *sorted({*self._json, *self._queries})]
                return _text(HTTPStatus.NOT_FOUND, "\n".join(["there is:", *pages]))


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: str, port: int, admin: AdminServer) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.admin = admin
        self._slots = threading.BoundedSemaphore(_MAX_REQUESTS)
        self._silent: dict[socket.socket, None] = {}  # have not asked yet, in the order in which they came
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        super().__init__((address, port), _Handler)

    def serve(self) -> None:
        """Accept until :meth:`stop`. The base class's loop wakes twice a second to see whether it should end."""
        while True:
            try:
                request, client_address = self.get_request()
            except OSError as error:
                if self._stopped.is_set():
                    return
                # Out of file descriptors, or the client is gone again.
                _log.warning("admin connection not accepted", error=error)
                self._stopped.wait(0.1)
                continue
            self.process_request(request, client_address)

    def stop(self) -> None:
        """Wake :meth:`serve` and end it."""
        self._stopped.set()
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # nothing was waiting
            pass

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False) and not self._make_room():
            self.shutdown_request(request)
            return
        with self._lock:
            self._silent[request] = None
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:  # no thread to be had
            _log.warning("admin connection not served", error=error)
            self._slots.release()
            self.shutdown_request(request)

    def _make_room(self) -> bool:
        with self._lock:
            first = next(iter(self._silent), None)
            if first is None:
                return False
            del self._silent[first]
            # Under the lock, which its thread takes before it closes it: the descriptor is not another's yet.
            with contextlib.suppress(OSError):
                first.shutdown(socket.SHUT_RDWR)
        return self._slots.acquire(timeout=_GIVING_WAY)

    def asked(self, request: socket.socket) -> None:
        """The client has asked for something, or is gone."""
        with self._lock:
            self._silent.pop(request, None)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def shutdown_request(self, request: Any) -> None:
        self.asked(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # The client's end of the connection failed: what we failed at is answered with 500 before.
        _log.debug("admin client lost", peer=client_address[0])


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _CLIENT_TIMEOUT

    def do_GET(self) -> None:
        self._answer("GET", with_body=True)

    def do_HEAD(self) -> None:
        self._answer("GET", with_body=False)

    def do_POST(self) -> None:
        self._answer("POST", with_body=True)

    def _answer(self, method: str, *, with_body: bool) -> None:
        self.server.asked(self.connection)
        try:
            answer = self.server.admin.answer(
                method,
                self.path,
                accept=self.headers.get("Accept", ""),
                from_loopback=_is_loopback(self.client_address[0]),
            )
        except Exception as error:
            _log.exception("admin page failed", path=self.path)
            answer = _text(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if with_body:
            self.wfile.write(answer.body)

    def log_message(self, format: str, *arguments: object) -> None:
        _log.debug("admin request", peer=self.client_address[0], line=format % arguments)


def _is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


def _text(status: HTTPStatus, text: str) -> Answer:
    return Answer(status, _TEXT, text.encode() + b"\n")


def _as_json(value: object) -> Answer:
    return Answer(HTTPStatus.OK, _JSON, msgspec.json.encode(value, enc_hook=str) + b"\n")
