"""Other projects' HTTP/1 cases: every case holds, or stands here with the reason why this proxy answers differently."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from l7proxy.errors import ProtocolError
from l7proxy.http1.head import RequestHead, ResponseHead
from l7proxy.http1.reader import End, RequestReader, ResponseReader

Count = Callable[[str, int, int, int], None]

#: Cases of servers' own options that this proxy does not have.
_OPTIONS = {
    "permit_obsolete_folding", "strip_header_spaces", "permit_unconventional_http_method", "casefold_http_method", "header_map",
    "proxy_protocol", "forwarded_allow_ips", "limit_request_line", "limit_request_fields", "limit_request_field_size",
    "permit_unconventional_http_version", "forwarder_headers", "secure_scheme_headers", "refuse_obsolete_folding",
}  # fmt: skip

#: gunicorn's valid requests that we refuse, and invalid ones that we take.
_LIMITS = "that server's own limit of 8 KiB for the fields; this proxy's is Envoy's, 60 KiB for the head"
_CODINGS = "this proxy understands no transfer coding but chunked and answers 501, as Envoy does (RFC 9112, section 6.1)"
GUNICORN_EXCEPTIONS: dict[str, str] = {
    "invalid/003c": "an extension method is any token (RFC 9110, section 9.1); that server wants upper-case letters",
    "invalid/007": _LIMITS,
    "invalid/008": _LIMITS,
    "invalid/017": _LIMITS,
    "invalid/041": "two Content-Types do not touch framing or routing: the application judges them",
    "valid/025": _CODINGS,
    "valid/029": _CODINGS,
    "valid/030": _CODINGS,
    "valid/040": "names with underscores are passed on, as Envoy's headers_with_underscores_action does by default",
}

#: llhttp's cases that we judge differently.
_METHODS = "an extension method is any token (RFC 9110, section 9.1); that parser knows a list"
_ICE = "RTSP and ICE (Icecast) are not HTTP"
_RESET = "the suite's parser is reset in the middle of a body: another connection to us"
_FRAGMENT = "a request target has no fragment (RFC 9112, section 3.2); Envoy refuses it too"
_EMPTY_LINE = "an empty line is ignored before requests (RFC 9112, section 2.2), not before responses: these bytes are unasked"
LLHTTP_EXCEPTIONS: dict[str, str] = {
    "request/content-length#447": _RESET,
    "request/invalid#69": _METHODS,
    "request/invalid#359": _METHODS,
    "request/method#65": "CONNECT is a request like others to this parser; the router knows no route for it and answers 404",
    "request/method#375": _ICE,
    "request/sample#317": "HTTP/0.9 is not spoken",
    "request/transfer-encoding#796": _FRAGMENT,
    "request/uri#168": _FRAGMENT,
    "request/uri#225": "user information in http URIs is refused (RFC 9110, section 4.2.4)",
    "response/connection#495": _EMPTY_LINE,
    "response/connection#589": _EMPTY_LINE,
    "response/content-length#126": _RESET,
    "response/sample#43": _ICE,
    "response/sample#63": _ICE,
    "response/sample#648": "HTTP/0.9 is not spoken",
    "response/transfer-encoding#77": "chunked must be the only coding; that parser reads to the end of the connection instead",
}


#: Both suites leave the rule that HTTP/1.1 needs a Host to the server above their parser; ours is in the grammar. Requests
#: without one get this one, so that they are refused, or not, for what the case is about.
_HOST = b"Host: inserted.example\r\n"
_LINE = re.compile(rb"(?m)^([!-~]+ [!-\xff]+ HTTP/1\.1\r\n)")


def with_host(data: bytes) -> bytes:
    return data if b"host:" in data.lower() else _LINE.sub(rb"\1" + _HOST, data)


def parse(
    reader: Any, data: bytes, step: int, *, last_closes: bool = False
) -> tuple[list[tuple[Any, bytes, Any]], ProtocolError | None]:
    """Messages as (head, body, trailers or None while incomplete), and the error that ended reading.

    ``last_closes``: nothing is read after a message that ends the connection, as the proxy does.
    """
    messages: list[tuple[Any, bytes, Any]] = []
    try:
        for at in range(0, len(data), step):
            reader.feed(data[at : at + step])
            while (event := reader.next()) is not None:
                if isinstance(event, RequestHead | ResponseHead):
                    messages.append((event, b"", None))
                elif isinstance(event, End):
                    head, body, _ = messages[-1]
                    messages[-1] = (head, body, event.trailers)
                    if last_closes and not head.keep_alive:
                        return messages, None
                else:
                    head, body, trailers = messages[-1]
                    messages[-1] = (head, body + event, trailers)
    except ProtocolError as error:
        return messages, error
    return messages, None


def _gunicorn_holds(case: dict[str, Any], data: bytes) -> str:
    """Empty, or what differs."""
    for step in (len(data) or 1, 1):
        messages, error = parse(RequestReader(), data, step, last_closes=True)
        complete = [m for m in messages if m[2] is not None]
        if "error" in case["expect"]:
            # Refused, or never complete; a request before the bad one is another case's matter.
            if error is None and len(complete) == len(messages) and messages:
                return f"taken: {messages}"[:200]
            continue
        expected = case["expect"]["requests"]
        if error is not None or len(complete) != len(expected):
            return f"step {step}: {error}, {len(complete)} of {len(expected)} requests"
        for (head, body, trailers), want in zip(complete, expected, strict=True):
            names = [
                [n.decode().upper(), v.decode("latin-1")] for n, v in head.fields if v != b"inserted.example"
            ]
            if head.method_text != want["method"]:
                return f"method {head.method}"
            if head.target.decode("latin-1") != want["uri"]["raw"]:
                return f"target {head.target}"
            if names != want["headers"]:
                return f"headers {names} != {want['headers']}"
            if body.hex() != want["body"]["hex"]:
                return f"body {body!r}"
            found = [[n.decode().upper(), v.decode("latin-1")] for n, v in trailers]
            if found != want.get("trailers", []):
                return f"trailers {found}"
    return ""


def test_gunicorn(shared: Path, conformance_count: Count) -> None:
    failures, passed, skipped, total = [], 0, 0, 0
    for path in sorted((shared / "conformance/http1/gunicorn").glob("*/*.json")):
        case = json.loads(path.read_text())
        total += 1
        if set(case["settings"]) & _OPTIONS or case["settings"]:
            skipped += 1
            continue
        difference = _gunicorn_holds(case, with_host(path.with_suffix(".bin").read_bytes()))
        if case["id"] in GUNICORN_EXCEPTIONS:
            assert difference, f"{case['id']} holds now: no exception"
            skipped += 1
        elif difference:
            failures.append(f"{case['id']}: {difference} ({case['expect'].get('error', 'valid')})")
        else:
            passed += 1
    conformance_count("http1/gunicorn", passed, total, skipped)
    assert not failures, "\n".join(failures)


def _body(case: dict[str, Any]) -> bytes:
    data = bytes.fromhex(case["input"]["hex"])
    spans = [e for e in case["events"] if e.get("span") == "body"]
    return b"".join(data[e["off"] : e["off"] + e["len"]] for e in spans)


def _llhttp_holds(case: dict[str, Any]) -> str:
    data = bytes.fromhex(case["input"]["hex"])
    response = case["type"].startswith("response")
    if not response:
        data = with_host(data)
    for step in (len(data) or 1, 1):
        reader = ResponseReader() if response else RequestReader()
        messages, error = parse(reader, data, step)
        if case["error"] is not None:
            if error is None and all(m[2] is not None for m in messages) and messages and reader.at_start:
                return f"taken: {messages}"[:200]
            continue
        events = case["events"]
        if error is not None:
            return f"step {step}: {error.reason}"
        names = [e.get("event", e.get("line", "")) for e in events]
        begun = sum(1 for n in names if n.startswith("headers complete"))
        complete = sum(1 for n in names if n.startswith("message complete"))
        ended = sum(m[2] is not None for m in messages)
        if len(messages) != begun or ended != complete:
            return f"step {step}: {len(messages)} heads of {begun}, {ended} complete of {complete}"
        # The suite's notation has no line ends inside spans.
        if b"".join(m[1] for m in messages).translate(None, b"\r\n") != _body(case).translate(None, b"\r\n"):
            return f"step {step}: body {[m[1] for m in messages]} not {_body(case)!r}"
    return ""


def test_llhttp(shared: Path, conformance_count: Count) -> None:
    cases = json.loads((shared / "conformance/http1/llhttp.json").read_text())
    failures, passed, skipped = [], 0, 0
    for case in cases:
        paused = any("pause" in str(e.get("event", "")) for e in case["events"])
        if case["type"] not in ("request", "response") or paused:
            skipped += 1
            continue
        difference = _llhttp_holds(case)
        if case["id"] in LLHTTP_EXCEPTIONS:
            assert difference, f"{case['id']} holds now: no exception"
            skipped += 1
        elif difference:
            failures.append(
                f"{case['id']} {case['name']}: {difference}\n    {case['input'].get('text')!r} {case['error']}"
            )
        else:
            passed += 1
    conformance_count("http1/llhttp", passed, len(cases), skipped)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("exceptions", [GUNICORN_EXCEPTIONS, LLHTTP_EXCEPTIONS])
def test_every_exception_has_a_reason(exceptions: dict[str, str]) -> None:
    assert all(len(reason) > 20 for reason in exceptions.values())
