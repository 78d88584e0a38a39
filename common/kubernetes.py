"""A client of the Kubernetes API: requests, paged lists and watches over raw JSON, without generated models.

Owns connections, time limits and which requests are repeated; :class:`Access` says where the server is and who we are.
It caches nothing and knows no kind. What the server refuses is an :class:`ApiError`; when it cannot be reached, or the answer
breaks off, :class:`Unreachable`.

Repeated: what the server itself asks to repeat (429, and 503 with Retry-After), a reading request whose connection broke, and
once after 401 with credentials read again. A writing request that broke off may have been carried out: its caller decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Self
from urllib.parse import quote

import aiohttp
import msgspec

from common.kubeconfig import Access, AccessError

__all__ = ["Access", "AccessError", "ApiError", "Client", "Unreachable", "path_of"]

#: Seconds to connect, and for a whole answer that is no watch.
_CONNECT_TIMEOUT = 5.0
_REQUEST_TIMEOUT = 30.0
#: Requests at once, and pages of lists at once beside them: a slow list must not hold up a Lease or a TokenReview. Each watch
#: has a connection of its own.
_CONNECTIONS = 8
#: Objects on a page of a list.
_PAGE = 500
_ATTEMPTS = 5
#: Longest that we wait because the server asks for it, seconds.
_MAX_RETRY_AFTER = 10.0
#: Seconds that the server keeps a watch open: at random between, so that they do not all end at once.
_WATCH_SECONDS = (300, 600)
#: Seconds without any event until a watch counts as broken; bookmarks come every minute.
_WATCH_SILENCE = 180.0
#: Bytes of one event: etcd takes no object beyond 1.5 MB, JSON may be somewhat larger.
_MAX_EVENT = 32 << 20
_MERGE_PATCH = "application/merge-patch+json"


class ApiError(Exception):
    """The server's answer was an error (metav1.Status)."""

    def __init__(
        self, status: int, reason: str, message: str, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(f"{status} {reason}: {message}" if reason else f"{status}: {message}")
        self.status = status  #: HTTP status; that of the Status object for an error within a watch
        self.reason = (
            reason  #: ``NotFound``, ``Conflict``, ``Expired``, ``Forbidden``, ...; empty if none was said
        )
        self.message = message
        self.details: Mapping[str, Any] = details or {}

    @property
    def expired(self) -> bool:
        """410: the resource version is too old; list again."""
        return self.status == 410

    @property
    def later(self) -> bool:
        """429, 503, 504: the server is busy, starting or slow. It has refused nothing."""
        return self.status in (429, 503, 504)


class Unreachable(Exception):
    """No answer, or none that is whole: no connection, a time limit, TLS, credentials that cannot be read."""


class Client:
    """Use as an async context manager; any number of tasks may use it at once.

    Paths are absolute (``/api/v1/pods``, see :func:`path_of`); keyword parameters go into the query as they are named
    (``labelSelector="app=a"``); True and False become ``true`` and ``false``, None leaves one out. ``accept`` goes into
    the header of that name: other forms of the answer (PartialObjectMetadata, say).
    """

    def __init__(
        self, access: Access, *, user_agent: str = "mycel", timeout: float = _REQUEST_TIMEOUT
    ) -> None:
        self.access = access
        self._agent = user_agent
        self._timeout = timeout

    async def __aenter__(self) -> Self:
        self._requests = self._session(_CONNECTIONS, self._timeout)
        self._lists = self._session(_CONNECTIONS, self._timeout)
        self._watches = self._session(0, None, _WATCH_SILENCE)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._requests.close()
        await self._lists.close()
        await self._watches.close()

    def _session(
        self, connections: int, total: float | None, silence: float | None = None
    ) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=connections, ttl_dns_cache=10, keepalive_timeout=60, socket_factory=_socket
            ),
            timeout=aiohttp.ClientTimeout(total=total, sock_connect=_CONNECT_TIMEOUT, sock_read=silence),
            headers={"User-Agent": self._agent, "Accept": "application/json, */*"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=True,
        )

    async def get(self, path: str, **params: Any) -> dict[str, Any]:
        """GET. Also for what is no object: ``get("/apis")``."""
        return _decoded(f"GET {path}", await self._bytes("GET", path, params))

    async def get_text(self, path: str, **params: Any) -> str:
        """GET of what is no JSON: ``/readyz``, a pod's ``/log``."""
        return (await self._bytes("GET", path, params)).decode(errors="replace")

    async def list(self, path: str, **params: Any) -> dict[str, Any]:
        """All pages as one list: ``items``, and ``metadata.resourceVersion`` to watch from.

        ``resourceVersion`` is left unset unless given: the most recent state, as a quorum has it. When a page's token expires
        (410) all is read again at once, unpaged.
        """
        try:
            return await self._list(path, params)
        except ApiError as e:
            if not e.expired:
                raise
            return await self._list(path, params | {"limit": None})

    async def _list(self, path: str, params: Mapping[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        async for items, version in self.pages(path, **params):
            result.setdefault("items", []).extend(items)
            result["metadata"] = {"resourceVersion": version}
        return result

    async def pages(self, path: str, **params: Any) -> AsyncIterator[tuple[Sequence[dict[str, Any]], str]]:
        """A list page by page: objects (of built-in kinds without apiVersion and kind), and the version of the whole list.

        :raises ApiError: ``expired`` if reading took too long; then begin again, with ``limit=None``.
        :raises Unreachable: also when the answer is no list.
        """
        params = {"limit": _PAGE} | params
        while True:
            page = _decoded(f"GET {path}", await self._bytes("GET", path, params, session=self._lists))
            try:
                metadata, items = page["metadata"], page["items"] or []
                version, token = metadata["resourceVersion"], metadata.get("continue")
            except (LookupError, TypeError, AttributeError) as e:
                # A list that only looks empty would cost all that is known of it.
                raise Unreachable(f"GET {path}: the answer is no list") from e
            yield items, version
            if not token:
                return
            # The token stands for the first page's version; naming one beside it is an error.
            params = {k: v for k, v in params.items() if not k.startswith("resourceVersion")}
            params["continue"] = token

    async def watch(
        self, path: str, *, opened: Callable[[], None] | None = None, **params: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Events (``type``, ``object``) from ``resourceVersion`` on, until the server ends the watch (5 to 10 minutes).

        Bookmarks are asked for and come as events of type BOOKMARK. Close the iterator (``contextlib.aclosing``) to end
        the watch early. ``opened`` is called once the server has agreed; events may be long in coming.

        :raises ApiError: refused, or the server said ERROR: ``expired`` means that the version is too old.
        :raises Unreachable: the stream broke.
        """
        seconds = random.randint(*_WATCH_SECONDS)
        params = {"allowWatchBookmarks": True, "timeoutSeconds": seconds} | params | {"watch": True}
        async with contextlib.aclosing(self._lines(path, params, opened)) as lines:
            async for line in lines:
                try:
                    event = msgspec.json.decode(line)
                    kind, body = event["type"], event["object"]
                except (msgspec.DecodeError, LookupError, TypeError) as e:
                    raise Unreachable(f"watch {path}: no event: {e}") from e
                if kind == "ERROR":
                    raise _status_error(body.get("code") or 500, body)
                yield event

    async def create(self, path: str, body: Mapping[str, Any], **params: Any) -> dict[str, Any]:
        """POST to a collection, or to a subresource (``.../token``, ``/apis/authentication.k8s.io/v1/tokenreviews``)."""
        return await self._request("POST", path, params, body)

    async def replace(self, path: str, body: Mapping[str, Any], **params: Any) -> dict[str, Any]:
        """PUT; with ``metadata.resourceVersion`` in the body only if nobody was faster (409 otherwise)."""
        return await self._request("PUT", path, params, body)

    async def patch(
        self,
        path: str,
        body: Mapping[str, Any] | Sequence[Any],
        content_type: str = _MERGE_PATCH,
        **params: Any,
    ) -> dict[str, Any]:
        """PATCH: a merge patch, unless ``content_type`` says otherwise."""
        return await self._request("PATCH", path, params, body, content_type)

    async def apply(
        self, path: str, body: Mapping[str, Any], manager: str, *, force: bool = False, **params: Any
    ) -> dict[str, Any]:
        """Server-side apply as ``manager``; ``force`` takes over fields of others (409 otherwise). Safe to repeat."""
        params |= {"fieldManager": manager, "force": force}
        return await self._request("PATCH", path, params, body, "application/apply-patch+yaml")

    async def delete(self, path: str, body: Mapping[str, Any] | None = None, **params: Any) -> dict[str, Any]:
        """DELETE; ``body`` is a DeleteOptions (preconditions)."""
        return await self._request("DELETE", path, params, body)

    async def _request(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any],
        body: object = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        return _decoded(f"{method} {path}", await self._bytes(method, path, params, body, content_type))

    async def _bytes(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any],
        body: object = None,
        content_type: str = "application/json",
        session: aiohttp.ClientSession | None = None,
    ) -> bytes:
        data = None if body is None else msgspec.json.encode(body)
        headers = {} if data is None else {"Content-Type": content_type}
        attempt = 0
        again = True  # credentials may be read again once
        while True:
            attempt += 1
            last = attempt >= _ATTEMPTS
            try:
                async with (session or self._requests).request(
                    method, self.access.server + path, data=data, **await self._options(params, headers)
                ) as response:
                    answer = await response.read()
                    if response.status < 400:
                        return answer
                    retry_after = response.headers.get("Retry-After")
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as e:
                # Mostly a kept connection that the server had closed; a second time it is what it looks like.
                if method != "GET" or attempt > 1 or isinstance(e, aiohttp.ClientConnectorError):
                    raise Unreachable(f"{method} {path}: {_text(e)}") from e
                continue
            except (aiohttp.ClientError, OSError, TimeoutError, AccessError) as e:
                raise Unreachable(f"{method} {path}: {_text(e)}") from e
            if response.status == 401 and again:
                self.access.refused()
                again = False
                continue
            if not last and (response.status == 429 or (response.status == 503 and retry_after)):
                await asyncio.sleep(_delay(retry_after, attempt))
                continue
            raise _error(response.status, answer)

    async def _lines(
        self, path: str, params: Mapping[str, Any], opened: Callable[[], None] | None
    ) -> AsyncGenerator[bytes, None]:
        """The lines of an answer that goes on for long."""
        for again in (True, False):
            try:
                async with self._watches.get(
                    self.access.server + path, **await self._options(params, {})
                ) as response:
                    if response.status == 401 and again:
                        self.access.refused()
                        continue
                    if response.status >= 400:
                        raise _error(response.status, await response.read())
                    if opened is not None:
                        opened()
                    parts: list[bytes] = []
                    size = 0
                    async for chunk in response.content.iter_any():
                        *lines, rest = chunk.split(b"\n")
                        for line in lines:
                            whole = b"".join((*parts, line))
                            parts, size = [], 0
                            if whole:
                                yield whole
                        if rest:
                            parts.append(rest)
                            size += len(rest)
                            if size > _MAX_EVENT:
                                raise Unreachable(f"watch {path}: an event of more than {_MAX_EVENT} bytes")
                    if parts:
                        raise Unreachable(f"watch {path}: ended within an event")
                return
            except (aiohttp.ClientError, OSError, TimeoutError, AccessError) as e:
                raise Unreachable(f"watch {path}: {_text(e)}") from e

    async def _options(self, params: Mapping[str, Any], content: Mapping[str, str]) -> dict[str, Any]:
        headers = [*await self.access.authorization(), *content.items()]
        if "accept" in params:
            headers.append(("Accept", params["accept"]))
        result: dict[str, Any] = {
            "params": {k: _parameter(v) for k, v in params.items() if v is not None and k != "accept"},
            "headers": headers,
            "allow_redirects": False,
        }
        context = self.access.tls()
        if context is not None:
            result["ssl"] = context
        if self.access.server_name:
            result["server_hostname"] = self.access.server_name
        if self.access.proxy:
            result["proxy"] = self.access.proxy
        return result


def path_of(api_version: str, plural: str, namespace: str = "", name: str = "", subresource: str = "") -> str:
    """``path_of("v1", "pods", "a", "b")`` is ``/api/v1/namespaces/a/pods/b``; without a namespace, that of all."""
    parts = ["/apis" if "/" in api_version else "/api", api_version]
    if namespace:
        parts += ["namespaces", quote(namespace, safe="")]
    parts += [plural, quote(name, safe="")] if name else [plural]
    return "/".join(parts + ([subresource] if subresource else []))


def _socket(info: Any) -> socket.socket:
    """A connection whose other end is gone without a word is told within half a minute: a watch may be silent for long."""
    family, kind, protocol, _, _ = info
    result = socket.socket(family, kind, protocol)
    result.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    result.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        result.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        result.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        result.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        result.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
    return result


def _decoded(request: str, data: bytes) -> dict[str, Any]:
    try:
        answer = msgspec.json.decode(data)
    except msgspec.DecodeError as e:
        raise Unreachable(f"{request}: the answer is no JSON: {e}") from e
    if not isinstance(answer, dict):
        raise Unreachable(f"{request}: the answer is no object")
    return answer


def _parameter(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _delay(retry_after: str | None, attempt: int) -> float:
    try:
        seconds = float(retry_after or "")
    except ValueError:
        seconds = 0.2 * 2**attempt
    return min(seconds, _MAX_RETRY_AFTER) * random.uniform(1.0, 1.2)


def _error(status: int, body: bytes) -> ApiError:
    try:
        answer = msgspec.json.decode(body)
        if isinstance(answer, dict) and answer.get("kind") == "Status":
            return _status_error(status, answer)
    except msgspec.DecodeError:
        pass
    return ApiError(status, "", body[:300].decode(errors="replace").strip())


def _status_error(status: int, answer: Mapping[str, Any]) -> ApiError:
    return ApiError(status, answer.get("reason") or "", answer.get("message") or "", answer.get("details"))


def _text(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"{error.host}:{error.port}: {error.certificate_error}"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"{error.host}:{error.port}: {error.os_error.strerror or error.os_error}"
    return str(error) or type(error).__name__
