"""VirtualService's HTTP routes, compiled for one port of one service.

Order is Istio's: routes as written, each match of a route a route of its own, nothing after one that matches everything.
A route with a condition that is not in force yet is left out and reported: it must not match more than was asked for.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from controlplane.istio.hosts import resolve
from controlplane.model.findings import Findings
from controlplane.model.routing import (
    Forward,
    HeaderChanges,
    HeaderMatch,
    MatchKind,
    QueryMatch,
    Redirect,
    Respond,
    RetryPolicy,
    Route,
    RouteMatch,
    StringMatch,
    Weighted,
    cluster_name,
)
from controlplane.schema.rules import duration
from controlplane.source import Object

#: Istio's retry policy where a route names none.
DEFAULT_RETRY = RetryPolicy(
    attempts=2,
    conditions=("connect-failure", "refused-stream", "unavailable", "cancelled", "retriable-status-codes"),
)
_NOT_YET = {
    "fault": "fault injection",
    "mirror": "mirroring",
    "mirrors": "mirroring",
    "corsPolicy": "CORS",
    "delegate": "delegation to another VirtualService",
}
_PSEUDO = {"method": ":method", "authority": ":authority", "scheme": ":scheme"}

#: Says which cluster a destination is: (destination, its field, port dialled) to cluster name.
Destination = Callable[[Mapping[str, Any], str, int], str]


class Compiler:
    """Compiles one VirtualService for one port."""

    def __init__(
        self, virtual_service: Object, port: int, destination: Destination, findings: Findings
    ) -> None:
        self._object = virtual_service
        self._port = port
        self._destination = destination
        self._findings = findings

    def routes(self) -> tuple[Route, ...]:
        """The routes that apply to the port; none if the VirtualService does not speak of it."""
        result: list[Route] = []
        for i, http in enumerate(self._object.spec.get("http") or ()):
            path = f"spec.http[{i}]"
            for route in self._http(http, path):
                if result and result[-1].match == RouteMatch():
                    text = "never reached: a route before it matches every request"
                    self._findings.warning(self._object, path, text, "put it before that route")
                    return tuple(result)
                result.append(route)
        return tuple(result)

    def _http(self, http: Mapping[str, Any], path: str) -> Iterator[Route]:
        for name, what in _NOT_YET.items():
            if http.get(name):
                self._findings.warning(self._object, f"{path}.{name}", f"{what}: accepted, not in force yet")
        matches = list(self._matches(http, path))
        if not matches or not (http.get("route") or http.get("redirect") or http.get("directResponse")):
            return
        for name, match in matches:
            action, headers = self._action(http, path)
            yield Route(match, action, "-".join(n for n in (http.get("name") or "", name) if n), headers)

    def _matches(self, http: Mapping[str, Any], path: str) -> Iterator[tuple[str, RouteMatch]]:
        written = http.get("match") or ()
        if not written:
            yield "", RouteMatch()
        for i, match in enumerate(written):
            at = f"{path}.match[{i}]"
            if match.get("port") and match["port"] != self._port:
                continue
            if match.get("gateways") and "mesh" not in match["gateways"]:
                continue
            unable = [f for f in ("sourceLabels", "sourceNamespace") if match.get(f)]
            for field in unable:
                text = "routing by who calls is not in force yet: this match is left out"
                self._findings.warning(self._object, f"{at}.{field}", text, "select callers by a header")
            if not unable:
                yield match.get("name") or "", _match(match)

    def _action(
        self, http: Mapping[str, Any], path: str
    ) -> tuple[Forward | Redirect | Respond, HeaderChanges | None]:
        headers, authority = _header_changes(http.get("headers"))
        if http.get("redirect"):
            return self._redirect(http["redirect"], path), headers
        if http.get("directResponse"):
            return _respond(http["directResponse"]), headers
        clusters = []
        written = http["route"]
        for i, route in enumerate(written):
            weight = (
                route.get("weight", 0) if len(written) > 1 else 100
            )  # the only one gets all, whatever it says
            if not weight:
                continue
            name = self._destination(route["destination"], f"{path}.route[{i}].destination", self._port)
            changes, own_authority = _header_changes(route.get("headers"))
            if own_authority:
                self._findings.warning(
                    self._object,
                    f"{path}.route[{i}].headers.request.set",
                    "rewriting the authority of one destination only is not in force yet",
                    "set it for the whole route",
                )
            clusters.append(Weighted(name, weight, changes))
        rewrite = http.get("rewrite") or {}
        regex = rewrite.get("uriRegexRewrite")
        forward = Forward(
            tuple(clusters),
            _milliseconds(http.get("timeout")) or 0,
            self._retry(http.get("retries"), path),
            rewrite.get("uri"),
            (regex.get("match", ""), regex.get("rewrite", "")) if regex else None,
            rewrite.get("authority") or authority,
        )
        return forward, headers

    def _retry(self, retries: Mapping[str, Any] | None, path: str) -> RetryPolicy | None:
        if retries is None:
            return DEFAULT_RETRY
        attempts = retries.get("attempts", 0)
        if attempts <= 0:
            if "attempts" not in retries:
                text = "attempts is not given, which means 0: no retry"
                self._findings.info(
                    self._object, f"{path}.retries.attempts", text, "say how many retries are wanted"
                )
            return None
        conditions = list(DEFAULT_RETRY.conditions)
        codes: list[int] = []
        if retries.get("retryOn"):
            terms = [t.strip() for t in retries["retryOn"].split(",") if t.strip()]
            codes = [int(t) for t in terms if t.isdigit()]
            conditions = [t for t in terms if not t.isdigit()]
            if codes and "retriable-status-codes" not in conditions:
                conditions.append("retriable-status-codes")
        if retries.get("retryRemoteLocalities"):
            text = "accepted, without effect: endpoints have no localities yet"
            self._findings.info(self._object, f"{path}.retries.retryRemoteLocalities", text)
        return RetryPolicy(
            attempts,
            tuple(conditions),
            tuple(codes),
            _milliseconds(retries.get("perTryTimeout")),
            _milliseconds(retries.get("backoff")),
            retries.get("retryIgnorePreviousHosts") is not False,
        )

    def _redirect(self, redirect: Mapping[str, Any], path: str) -> Redirect:
        if redirect.get("derivePort"):
            text = "accepted, not in force yet: the port of the request stays"
            self._findings.warning(self._object, f"{path}.redirect.derivePort", text)
        return Redirect(
            redirect.get("redirectCode") or 301,
            redirect.get("uri"),
            redirect.get("prefixRewrite"),
            redirect.get("authority"),
            redirect.get("scheme"),
            redirect.get("port"),
        )


def destination_cluster(
    destination: Mapping[str, Any], namespace: str, single_port: int | None, dialled: int
) -> tuple[str, str]:
    """Host and cluster of a destination: its port, else the only one of its service, else the one that was dialled."""
    host = resolve(destination["host"], namespace)
    port = (destination.get("port") or {}).get("number") or single_port or dialled
    return host, cluster_name(host, port, destination.get("subset") or "")


def _match(match: Mapping[str, Any]) -> RouteMatch:
    headers = [HeaderMatch(_PSEUDO[n], _string(match[n])) for n in _PSEUDO if match.get(n) is not None]
    headers += [
        HeaderMatch(n.lower(), _string(m or {})) for n, m in sorted((match.get("headers") or {}).items())
    ]
    headers += [
        HeaderMatch(n.lower(), _string(m or {}), invert=True)
        for n, m in sorted((match.get("withoutHeaders") or {}).items())
    ]
    query = [QueryMatch(n, _string(m or {})) for n, m in sorted((match.get("queryParams") or {}).items())]
    uri = _string(match.get("uri") or {}, ignore_case=match.get("ignoreUriCase") or False)
    path = RouteMatch().path if uri.kind is MatchKind.PRESENT else uri
    return RouteMatch(path, tuple(headers), tuple(query))


def _string(match: Mapping[str, str], ignore_case: bool = False) -> StringMatch:
    """An Istio StringMatch; an empty one, or the regex ``*``, asks for presence only."""
    for kind in (MatchKind.EXACT, MatchKind.PREFIX, MatchKind.REGEX):
        if kind.value in match:
            if kind is MatchKind.REGEX:
                return (
                    StringMatch(MatchKind.PRESENT)
                    if match["regex"] == "*"
                    else StringMatch(kind, match["regex"])
                )
            return StringMatch(kind, match[kind.value], ignore_case)
    return StringMatch(MatchKind.PRESENT)


def _header_changes(headers: Mapping[str, Any] | None) -> tuple[HeaderChanges | None, str | None]:
    """The changes, and the authority that a request header ``host`` is set to (which is no header to Envoy)."""
    if not headers:
        return None, None
    authority = None
    pairs: dict[str, tuple[Any, ...]] = {}
    for side in ("request", "response"):
        operations = headers.get(side) or {}
        for verb in ("set", "add"):
            items = dict(operations.get(verb) or {})
            for name in [n for n in items if side == "request" and n.lower() in ("host", ":authority")]:
                value = items.pop(name)
                authority = value if verb == "set" else authority
            pairs[f"{side}_{verb}"] = tuple(sorted(items.items()))
        pairs[f"{side}_remove"] = tuple(operations.get("remove") or ())
    changes = HeaderChanges(**pairs)
    return (changes if changes != HeaderChanges() else None), authority


def _respond(response: Mapping[str, Any]) -> Respond:
    body = response.get("body") or {}
    if "bytes" in body:
        return Respond(response["status"], base64.b64decode(body["bytes"]))
    return Respond(response["status"], body.get("string", "").encode())


def _milliseconds(text: str | None) -> int | None:
    return round(duration(text) * 1000) if text else None
