"""The heads that this proxy writes: what an Istio sidecar's outbound listener adds, removes and keeps.

Owns the bytes of heads in both directions. Names go out in lower case, as Envoy writes them; hop-by-hop fields are gone
already (:mod:`l7proxy.http1.head`). ``x-forwarded-for`` is appended only where the listener says ``use_remote_address``
(Istio's outbound listeners do not), ``x-forwarded-proto`` and ``x-request-id`` are set where they are missing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from email.utils import formatdate
from http import HTTPStatus

from l7proxy.http1.head import CHUNKED, RequestHead, ResponseHead
from l7proxy.matcher import rewritten_path
from l7proxy.model import HeaderMutation, HttpManager, Route, WeightedCluster

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
SERVER = b"mycel"
#: What :func:`attempt_lines` writes.
_ATTEMPT = frozenset({b"x-envoy-attempt-count", b"x-envoy-expected-rq-timeout-ms"})


class RequestIds:
    """Random UUIDs (version 4) as text, made many at a time."""

    __slots__ = ("_ready",)
    _BATCH = 256
    _PARTS = re.compile(rb"(.{8})(.{4}).(.{3}).(.{3})(.{12})")

    def __init__(self) -> None:
        self._ready: list[bytes] = []

    def next(self) -> bytes:
        if not self._ready:
            digits = os.urandom(16 * self._BATCH).hex().encode()
            # RFC 9562, section 5.4: version 4; of the variant's four digits this uses one.
            self._ready = self._PARTS.sub(rb"\1-\2-4\3-a\4-\5 ", digits).split()
        return self._ready.pop()


def framing(head: RequestHead) -> bytes:
    if head.length == CHUNKED:
        return b"transfer-encoding: chunked\r\n"
    if head.length or b"content-length" in head.values:
        return b"content-length: %d\r\n" % head.length
    return b""


def request_prefix(
    head: RequestHead,
    route: Route,
    choice: WeightedCluster,
    manager: HttpManager,
    client: str,
    auto_host: str,
) -> bytes:
    """The head of the upstream request but for what differs per attempt, without its empty line.

    ``client`` is the downstream peer's address; ``auto_host`` replaces the authority if the route says so.
    """
    cacheable = route.plain and not manager.use_remote_address
    if cacheable and head.cached_upstream[0] is route:
        return head.cached_upstream[1]
    path, authority, forwarded = head.path, head.host, head.forwarded
    if b"x-forwarded-proto" not in head.values:
        forwarded += b"x-forwarded-proto: http\r\n"
    if (route.attempt_count or route.timeout) and not _ATTEMPT.isdisjoint(head.values):
        # An application may pass on what an earlier proxy told it.
        forwarded = mutate(forwarded, (HeaderMutation(remove=tuple(_ATTEMPT)),))
    if not route.plain:
        path = rewritten_path(route, path)
        authority = route.host_rewrite or (auto_host if route.auto_host_rewrite else "") or authority
        forwarded = mutate(forwarded, (choice.request_headers, route.request_headers))
    lines = [f"{head.method_text} {path} HTTP/1.1\r\nhost: {authority}\r\n".encode("latin-1"), framing(head)]
    if head.te_trailers:
        lines.append(b"te: trailers\r\n")
    if manager.use_remote_address and not manager.skip_xff_append:
        earlier = head.values.get(b"x-forwarded-for")
        chain = (earlier + b"," if earlier else b"") + client.encode()
        forwarded = mutate(forwarded, (HeaderMutation(remove=(b"x-forwarded-for",)),))
        lines.append(b"x-forwarded-for: " + chain + b"\r\n")
    lines.append(forwarded)
    if path != head.path and b"x-envoy-original-path" not in head.values:
        lines.append(f"x-envoy-original-path: {head.path}\r\n".encode("latin-1"))
    if head.upgrade:
        lines.append(f"connection: upgrade\r\nupgrade: {head.upgrade}\r\n".encode("latin-1"))
    prefix = b"".join(lines)
    if cacheable:
        head.cached_upstream = (route, prefix)
    return prefix


def mutate(block: bytes, mutations: Iterable[HeaderMutation]) -> bytes:
    """Apply additions and removals to lines of fields (lower-case names)."""
    lines = block.split(b"\r\n")[:-1]
    for mutation in mutations:
        for name in mutation.remove:
            lines = [line for line in lines if not line.startswith(name + b":")]
        for value in mutation.add:
            start = value.name + b":"
            there = any(line.startswith(start) for line in lines)
            if there and value.only_if_absent:
                continue
            if there and not value.append:
                lines = [line for line in lines if not line.startswith(start)]
            lines.append(b"%b: %b" % (value.name, value.value))
    return b"".join([line + b"\r\n" for line in lines])


def attempt_lines(route: Route, attempt: int, timeout: float) -> bytes:
    """What Envoy's router tells the upstream of this attempt."""
    lines = b""
    if route.attempt_count:
        lines = b"x-envoy-attempt-count: %d\r\n" % attempt
    if timeout:
        lines += b"x-envoy-expected-rq-timeout-ms: %d\r\n" % int(timeout * 1000)
    return lines


def response_head(
    head: ResponseHead,
    request: RequestHead,
    route: Route,
    choice: WeightedCluster,
    service_time: int,
    *,
    close: bool,
) -> tuple[bytes, bool]:
    """The head of the downstream response, and whether its body goes in chunks."""
    forwarded = head.forwarded
    if route.response_headers or choice.response_headers:
        forwarded = mutate(forwarded, (choice.response_headers, route.response_headers))
    extra = b""
    if b"date" not in head.values:
        extra = b"date: %b\r\n" % formatdate(usegmt=True).encode()
    chunked = head.length < 0 and request.minor == 1
    if chunked:
        extra += b"transfer-encoding: chunked\r\n"
    if close:
        extra += b"connection: close\r\n"
    elif not request.minor:
        extra += b"connection: keep-alive\r\n"
    return b"%b%bx-envoy-upstream-service-time: %d\r\n%b\r\n" % (
        head.start_line,
        forwarded,
        service_time,
        extra,
    ), chunked


def switching_head(head: ResponseHead) -> bytes:
    """A 101 that goes downstream."""
    return b"%b%bconnection: upgrade\r\nupgrade: %b\r\n\r\n" % (
        head.start_line,
        head.forwarded,
        head.upgrade.encode("latin-1"),
    )


def local_reply(
    status: int,
    body: bytes,
    *,
    close: bool,
    bodyless: bool = False,
    extra: bytes = b"",
    mutation: HeaderMutation | None = None,
) -> bytes:
    """A complete response of this proxy's own. ``bodyless``: the request was a HEAD."""
    if status in (204, 304):
        body = b""  # RFC 9110, section 6.4.1: there is none, what follows would be the next response
    reason = _REASONS.get(status, b"Unknown")
    content = b"content-type: text/plain\r\n" if body else b""
    fields = b"%b%bdate: %b\r\nserver: %b\r\n" % (content, extra, formatdate(usegmt=True).encode(), SERVER)
    if mutation:
        fields = mutate(fields, (mutation,))
    if close:
        fields += b"connection: close\r\n"
    return b"HTTP/1.1 %d %b\r\ncontent-length: %d\r\n%b\r\n%b" % (
        status, reason, len(body), fields, b"" if bodyless else body,
    )  # fmt: skip


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def last_chunk(trailers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"0\r\n%b\r\n" % b"".join([b"%b: %b\r\n" % pair for pair in trailers])
