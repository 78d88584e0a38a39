"""What Istio's webhook refuses beyond the schema: checks of one object that a schema cannot say."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from controlplane.istio import GROUP_NETWORKING, GROUP_SECURITY

Problem = tuple[str, str]

#: What Python's regular expressions know and RE2 (Envoy's and Istio's) does not, and the reverse.
_NOT_RE2 = re.compile(r"\(\?(?:=|!|<[=!]|#|\(|P[=>])|\\[1-9]")
_ONLY_RE2 = re.compile(r"\\[pPzQEC]|\[\[:")
#: RE2 refuses a larger bound in ``x{n,m}``.
_RE2_REPEAT = 1000
_BOUNDS = re.compile(r"(?<!\\)\{(\d+)(?:,(\d*))?\}")
#: Names and values of headers that Envoy takes (RFC 9110, 5.1 and 5.5; a pseudo header has a colon before its name). It refuses
#: a whole route table for one that is none.
_HEADER_NAME = re.compile(r":?[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_NO_VALUE = re.compile(r"[\0\r\n]")
_MOST_WEIGHT = 2**32 - 1
#: Envoy's retry conditions (router filter, x-envoy-retry-on and x-envoy-retry-grpc-on).
_RETRY_ON = frozenset(
    (
        *("5xx", "gateway-error", "reset", "reset-before-request", "connect-failure", "envoy-ratelimited"),
        *("retriable-4xx", "refused-stream", "retriable-status-codes", "retriable-headers"),
        *("http3-post-connect-failure", "cancelled", "deadline-exceeded", "internal", "resource-exhausted"),
        "unavailable",
    )
)
_CONDITIONS = re.compile(
    r"source\.(ip|namespace|principal|serviceAccount|trustDomain)|remote\.ip|destination\.(ip|port)|connection\.sni"
    r"|request\.headers\[[^\]]+\]|request\.auth\.(principal|audiences|presenter|claims(\[[^\]]+\])+)"
    r"|experimental\.envoy\.filters\.[^\[]+(\[[^\]]+\])?"
)


def validate(manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """(field, reason) of everything wrong with one object that its schema accepts."""
    group, _, _ = manifest["apiVersion"].rpartition("/")
    check = _CHECKS.get((group, manifest["kind"]))
    if check:
        yield from check(manifest.get("spec") or {})


def _virtual_service(spec: Mapping[str, Any]) -> Iterator[Problem]:
    if not spec.get("hosts"):
        yield "spec.hosts", "at least one host is required"
    if not any(spec.get(k) for k in ("http", "tcp", "tls")):
        yield "spec", "http, tcp or tls is required"
    for i, http in enumerate(spec.get("http") or ()):
        yield from _http(http, f"spec.http[{i}]")
    for i, tcp in enumerate(spec.get("tcp") or ()):
        yield from _tcp(tcp, f"spec.tcp[{i}]")


def _tcp(tcp: Mapping[str, Any], path: str) -> Iterator[Problem]:
    for i, match in enumerate(tcp.get("match") or ()):
        if (match or {}).get("port", 1) not in range(1, 65536):
            yield f"{path}.match[{i}].port", "port must be between 1-65535"
    if not tcp.get("route"):
        yield f"{path}.route", "required, but missing"
    yield from _shares(tcp.get("route") or (), path)


def _shares(routes: Sequence[Mapping[str, Any]], path: str) -> Iterator[Problem]:
    weights = [r.get("weight", 0) for r in routes]
    for i, (route, weight) in enumerate(zip(routes, weights, strict=True)):
        if weight < 0:
            yield f"{path}.route[{i}].weight", f"{weight} is negative"
        yield from _destination(route.get("destination"), f"{path}.route[{i}].destination")
    if sum(weights) > _MOST_WEIGHT:
        yield f"{path}.route", f"the weights' sum is {sum(weights)}, at most {_MOST_WEIGHT}"
    if len(routes) > 1 and sum(weights) <= 0:
        yield f"{path}.route", "the weights' sum is 0: give each route of several a weight"


def _http(http: Mapping[str, Any], path: str) -> Iterator[Problem]:
    actions = [a for a in ("route", "redirect", "directResponse") if http.get(a)]
    if not actions and not http.get("delegate"):
        yield path, "route, redirect, directResponse or delegate is required"
    if len(actions) > 1:
        yield path, f"only one of {', '.join(actions)} may be set"
    routes = http.get("route") or ()
    yield from _shares(routes, path)
    for i, route in enumerate(routes):
        yield from _headers(route.get("headers") or {}, f"{path}.route[{i}].headers")
    for i, match in enumerate(http.get("match") or ()):
        yield from _match(match or {}, f"{path}.match[{i}]")
    yield from _headers(http.get("headers") or {}, f"{path}.headers")
    for part, fields in (
        ("rewrite", ("uri", "authority")),
        ("redirect", ("uri", "prefixRewrite", "authority", "scheme")),
    ):
        for field in fields:
            yield from _value((http.get(part) or {}).get(field), f"{path}.{part}.{field}")
    yield from _retries(http.get("retries") or {}, f"{path}.retries")
    regex = ((http.get("rewrite") or {}).get("uriRegexRewrite") or {}).get("match")
    if regex is not None:
        yield from _regex(regex, f"{path}.rewrite.uriRegexRewrite.match")
    code = (http.get("redirect") or {}).get("redirectCode", 301)
    if code not in (301, 302, 303, 307, 308):
        yield f"{path}.redirect.redirectCode", f"{code} is none of 301, 302, 303, 307, 308"
    status = (http.get("directResponse") or {}).get("status", 200)
    if not 200 <= status <= 599:
        yield f"{path}.directResponse.status", f"{status} is no status of a response (200 to 599)"


def _match(match: Mapping[str, Any], path: str) -> Iterator[Problem]:
    strings = [(f, match.get(f)) for f in ("uri", "method", "authority", "scheme")]
    for group in ("headers", "withoutHeaders", "queryParams"):
        for name, value in (match.get(group) or {}).items():
            if not name:
                yield f"{path}.{group}", "a name is empty"
            elif group != "queryParams" and not _HEADER_NAME.fullmatch(name):
                yield f"{path}.{group}", f"{name!r} is no name of a header"
            strings.append((f"{group}.{name}", value))
    for name, value in strings:
        regex = (value or {}).get("regex")
        if regex is not None and regex != "*":
            yield from _regex(regex, f"{path}.{name}.regex")
    uri = match.get("uri") or {}
    for kind in ("exact", "prefix"):
        if kind in uri and not uri[kind].startswith("/"):
            yield f"{path}.uri.{kind}", f"{uri[kind]!r} does not begin with /"
    if match.get("port", 1) not in range(1, 65536):
        yield f"{path}.port", "port must be between 1-65535"


def _headers(headers: Mapping[str, Any], path: str) -> Iterator[Problem]:
    for side in ("request", "response"):
        operations = headers.get(side) or {}
        for verb in ("set", "add", "remove"):
            changes = operations.get(verb) or {}
            for name in changes:
                if not _HEADER_NAME.fullmatch(name):
                    yield f"{path}.{side}.{verb}", f"{name!r} is no name of a header"
                elif verb != "remove":
                    yield from _value(changes[name], f"{path}.{side}.{verb}.{name}")


def _value(text: str | None, path: str) -> Iterator[Problem]:
    if text and _NO_VALUE.search(text):
        yield path, "has a line end or a NUL in it"


def _retries(retries: Mapping[str, Any], path: str) -> Iterator[Problem]:
    if retries.get("attempts", 0) < 0:
        yield f"{path}.attempts", "is negative"
    for term in (retries.get("retryOn") or "").split(","):
        term = term.strip()
        if term and term not in _RETRY_ON and not _between(term, 100, 599):
            yield f"{path}.retryOn", f"{term!r} is no retry condition and no HTTP status"


def _destination(destination: Mapping[str, Any] | None, path: str) -> Iterator[Problem]:
    if not destination or not destination.get("host"):
        yield f"{path}.host", "required, but missing"
    elif "*" in destination["host"]:
        yield f"{path}.host", "a wildcard is no destination"
    number = ((destination or {}).get("port") or {}).get("number")
    if number is not None and not 1 <= number <= 65535:
        yield f"{path}.port.number", "port must be between 1-65535"


def _regex(regex: str, path: str) -> Iterator[Problem]:
    try:
        if _NOT_RE2.search(regex):
            raise re.error("it has a look-around or a back reference")
        if any(int(n) > _RE2_REPEAT for bounds in _BOUNDS.findall(regex) for n in bounds if n):
            raise re.error(f"it repeats more than {_RE2_REPEAT} times")
        if not _ONLY_RE2.search(regex):
            re.compile(regex)
    except (re.error, ValueError, OverflowError, RecursionError) as e:
        yield path, f"is no RE2 expression: {e}"


def _destination_rule(spec: Mapping[str, Any]) -> Iterator[Problem]:
    if not spec.get("host"):
        yield "spec.host", "required, but missing"
    seen = set()
    for i, subset in enumerate(spec.get("subsets") or ()):
        if not subset.get("name"):
            yield f"spec.subsets[{i}].name", "required, but missing"
        elif subset["name"] in seen:
            yield f"spec.subsets[{i}].name", f"{subset['name']} stands twice"
        seen.add(subset.get("name"))


def _authorization_policy(spec: Mapping[str, Any]) -> Iterator[Problem]:
    if spec.get("action") == "CUSTOM" and not (spec.get("provider") or {}).get("name"):
        yield "spec.provider.name", "CUSTOM needs a provider"
    for i, rule in enumerate(spec.get("rules") or ()):
        path = f"spec.rules[{i}]"
        for side, inner in (("from", "source"), ("to", "operation")):
            if side in rule and not rule[side]:
                yield f"{path}.{side}", "is empty: leave it out to match everything"
            for j, item in enumerate(rule.get(side) or ()):
                at = f"{path}.{side}[{j}].{inner}"
                fields = (item or {}).get(inner)
                if not fields:
                    yield at, "is empty: leave it out to match everything"
                for name, values in (fields or {}).items():
                    yield from _values(name, values, f"{at}.{name}")
        for j, condition in enumerate(rule.get("when") or ()):
            yield from _condition(condition, f"{path}.when[{j}]")


def _values(name: str, values: list[str], path: str) -> Iterator[Problem]:
    if not values:
        yield path, "is empty: leave it out to match everything"
    for i, value in enumerate(values or ()):
        at = f"{path}[{i}]"
        if not value:
            yield at, "is empty"
        elif name in ("ports", "notPorts"):
            yield from _port(value, at)
        elif name.lower().endswith("ipblocks"):
            yield from _block(value, at)
        elif name in ("serviceAccounts", "notServiceAccounts") and "*" in value:
            yield at, "a service account has no wildcard"


def _condition(condition: Mapping[str, Any], path: str) -> Iterator[Problem]:
    key = condition.get("key") or ""
    if not _CONDITIONS.fullmatch(key):
        yield f"{path}.key", f"{key!r} is no attribute that a condition can have"
    values = [*(condition.get("values") or ()), *(condition.get("notValues") or ())]
    if not values:
        yield path, "values or notValues is required"
    for value in values:
        if key == "destination.port":
            yield from _port(value, path)
        elif key in ("source.ip", "remote.ip", "destination.ip"):
            yield from _block(value, path)


def _port(value: str, path: str) -> Iterator[Problem]:
    if not _between(value, 1, 65535):
        yield path, f"{value!r} is no port: port must be between 1-65535"


def _between(text: str, low: int, high: int) -> bool:
    """Whether it is a number from ``low`` to ``high``, in ASCII digits and no more of them than :class:`int` takes."""
    return text.isascii() and text.isdigit() and len(text) <= 20 and low <= int(text) <= high


def _block(value: str, path: str) -> Iterator[Problem]:
    try:
        ipaddress.ip_network(value, strict=False)
    except ValueError:
        yield path, f"{value!r} is no address and no CIDR block"


_CHECKS: dict[tuple[str, str], Callable[[Mapping[str, Any]], Iterator[Problem]]] = {
    (GROUP_NETWORKING, "VirtualService"): _virtual_service,
    (GROUP_NETWORKING, "DestinationRule"): _destination_rule,
    (GROUP_SECURITY, "AuthorizationPolicy"): _authorization_policy,
}
