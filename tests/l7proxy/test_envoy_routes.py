"""Envoy's own route-table cases through the real conversion and the real matcher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from envoy.config.route.v3 import route_pb2
from google.protobuf import json_format

from l7proxy import convert_routes, matcher
from l7proxy.errors import ConversionError
from l7proxy.headers import local_reply
from l7proxy.http1.head import RequestHead, parse_request_head
from l7proxy.model import Route, RouteTable
from tests.l7proxy.fakes import xds

Count = Callable[[str, int, int, int], None]

#: What a case asks for and this proxy does not have, with the reason.
NOT_APPLICABLE = {
    "virtual_cluster_name": "virtual clusters only name statistics of Envoy's own",
}


def _table(path: Path) -> RouteTable:
    document = yaml.safe_load(path.read_text())
    message = json_format.ParseDict(_durations(document), route_pb2.RouteConfiguration())
    return convert_routes.route_table(message)


def _durations(value: Any) -> Any:
    """Envoy's YAML may write a duration as its fields, where JSON has text."""
    if isinstance(value, dict):
        if value and value.keys() <= {"seconds", "nanos"}:
            return f"{value.get('seconds', 0)}.{value.get('nanos', 0):09d}s"
        return {key: _durations(item) for key, item in value.items()}
    return [_durations(item) for item in value] if isinstance(value, list) else value


def _head(case: dict[str, Any]) -> RequestHead:
    sent = case["input"]
    extra = sent.get("additional_request_headers", sent.get("additional_headers", []))
    lines = [f"{sent.get('method', 'GET')} {sent['path']} HTTP/1.1", f"host: {sent['authority']}"]
    lines += [f"{h['key']}: {h['value']}" for h in extra if not h["key"].startswith(":")]
    return parse_request_head(("\r\n".join(lines) + "\r\n\r\n").encode())


def _observed(table: RouteTable, case: dict[str, Any]) -> dict[str, Any]:
    head = _head(case)
    random = case["input"].get("random_value", 0)
    host = matcher.virtual_host(table, head.host)
    result: dict[str, Any] = {
        "cluster_name": "",
        "virtual_host_name": "",
        "path_redirect": "",
        "timeout": "",
        "response": b"",
    }
    if host is None:
        return result
    result["virtual_host_name"] = host.name
    secure, internal = case["input"].get("ssl", False), case["input"].get("internal", False)
    route: Route | None = matcher.find_in(host, head, random, secure=secure, internal=internal)
    if route is None:
        return result
    if route.redirect is not None:
        result["path_redirect"] = matcher.redirect_location(
            route.redirect, route, head, "https" if secure else "http"
        )
        return result
    if route.direct is not None:
        # The tool fills in the request's own URL for a direct response, and looks no further.
        result |= {"path_redirect": f"http://{head.host}{head.path}", "virtual_host_name": ""}
        result |= {"host_rewrite": "", "path_rewrite": ""}
        reply = local_reply(
            route.direct.status, route.direct.body, close=False, mutation=route.response_headers
        )
        # An empty body's length is the codec's to write, after the router.
        result["response"] = reply.partition(b"\r\n\r\n")[0].replace(b"content-length: 0\r\n", b"")
        return result
    choice = matcher.choose_cluster(route, head, random)
    result["cluster_name"] = choice.name if choice else ""
    result["path_rewrite"] = matcher.rewritten_path(route, head.path)
    result["host_rewrite"] = route.host_rewrite or head.host
    result["timeout"] = f"{route.timeout:g}s"
    return result


def _differences(table: RouteTable, case: dict[str, Any]) -> list[str]:
    observed = _observed(table, case)
    found = []
    for field, wanted in case["validate"].items():
        if field in NOT_APPLICABLE:
            continue
        if field == "response_header_matches":
            for match in wanted:
                values = [
                    line.partition(b": ")[2].decode()
                    for line in observed["response"].split(b"\r\n")
                    if line.partition(b":")[0].decode() == match["name"].lower()
                ]
                string = match.get("string_match", {}).get("exact", match.get("exact_match"))
                present = match.get("present_match", True)
                if "presence_match" in match:
                    present = match["presence_match"]
                holds = bool(values) == present if string is None else ",".join(values) == string
                if holds == match.get("invert_match", False):
                    found.append(f"response header {match}: {values}")
        elif observed.get(field) != wanted:
            found.append(f"{field}: {observed.get(field)!r}, not {wanted!r}")
    return found


def test_route_tables(shared: Path, conformance_count: Count) -> None:
    folder = shared / "conformance/envoy-routes"
    failures, passed, total, tables = [], 0, 0, 0
    for golden in sorted(folder.glob("*.golden.proto.json")):
        name = golden.name.split(".")[0]
        tables += name != "TimeoutFailures"
        table = _table(folder / ("Timeout.yaml" if name == "TimeoutFailures" else f"{name}.yaml"))
        for case in json.loads(golden.read_text())["tests"]:
            total += 1
            differences = _differences(table, case)
            if name == "TimeoutFailures":
                differences = [] if differences else ["must fail and holds"]
            if differences:
                failures.append(f"{name}/{case['test_name']}: {differences}")
            else:
                passed += 1
    conformance_count("envoy-routes", passed, total, 0)
    assert (tables, total) == (8, 38)  # one table has two files of cases
    assert not failures, "\n".join(failures)


def _with_route(match: dict[str, Any], **route: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": "a",
            "domains": ["*"],
            "routes": [{"match": match, **(route or {"route": {"cluster": "c"}})}],
        }
    ]


_ALL = {"prefix": "/"}


@pytest.mark.parametrize(
    ("hosts", "reason"),
    [
        (_with_route(_ALL, filter_action={}), "action"),
        ([{"name": "a", "domains": ["x"]}, {"name": "b", "domains": ["X"]}], "in two virtual hosts"),
        ([{"name": "a", "domains": ["a*b"]}], "star"),
        (_with_route({"safe_regex": {"regex": "("}}), "safe_regex"),
        (_with_route(_ALL, route={"cluster": "c", "retry_policy": {"retry_on": "sometimes"}}), "retry_on"),
        (
            _with_route(_ALL, route={"weighted_clusters": {"clusters": [{"name": "c", "weight": 0}]}}),
            "weights",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_field(hosts: list[dict[str, Any]], reason: str) -> None:
    message = json_format.ParseDict({"virtual_hosts": hosts}, route_pb2.RouteConfiguration())
    with pytest.raises(ConversionError, match=reason):
        convert_routes.route_table(message)


def _host(name: str, *domains: str) -> dict[str, Any]:
    return {
        "name": name,
        "domains": list(domains),
        "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name}}],
    }


def test_domains_by_envoys_order() -> None:
    document = {
        "virtual_hosts": [
            _host("any", "*"),
            _host("suffix", "*.example.com"),
            _host("longer", "*.a.example.com"),
            _host("prefix", "www.*"),
            _host("exact", "www.example.com", "port.example.com:8080"),
        ]
    }
    table = convert_routes.route_table(json_format.ParseDict(document, route_pb2.RouteConfiguration()))
    for authority, name in (
        ("www.example.com", "exact"),
        ("WWW.Example.Com", "exact"),
        ("port.example.com:8080", "exact"),
        ("port.example.com", "suffix"),
        ("x.a.example.com", "longer"),
        ("www.other", "prefix"),
        ("example.com", "any"),
        ("", "any"),
    ):
        found = matcher.virtual_host(table, authority)
        assert found is not None
        assert found.name == name, authority


def _one(action: dict[str, Any], match: dict[str, Any] | None = None) -> RouteTable:
    return convert_routes.route_table(xds.routes({"match": match or {"prefix": "/"}, **action}))


@pytest.mark.parametrize(
    ("action", "field"),
    [
        ({"redirect": {"host_redirect": "a\r\nset-cookie: b"}}, "host_redirect"),
        ({"redirect": {"path_redirect": "/a b"}}, "path_redirect"),
        ({"route": {"cluster": "a", "prefix_rewrite": "/x HTTP/1.1\r\nhost: b"}}, "prefix_rewrite"),
        ({"route": {"cluster": "a", "host_rewrite_literal": "a b"}}, "host_rewrite_literal"),
        (
            {
                "route": {
                    "cluster": "a",
                    "regex_rewrite": {"pattern": {"regex": "(a)"}, "substitution": "\\2"},
                }
            },
            "substitution",
        ),
        (
            {"route": {"cluster": "a", "regex_rewrite": {"pattern": {"regex": "a"}, "substitution": "\\g"}}},
            "substitution",
        ),
        ({"direct_response": {"status": 101}}, "direct_response.status"),
        ({"direct_response": {}}, "direct_response.status"),
        ({"route": {"cluster": "a"}, "response_headers_to_remove": ["Content-Length"]}, "content-length"),
    ],
)
def test_what_would_break_a_message_is_refused(action: dict[str, Any], field: str) -> None:
    with pytest.raises(ConversionError, match=field):
        _one(action)


@pytest.mark.parametrize(
    ("match", "rewrite", "path", "rewritten"),
    [
        ({"safe_regex": {"regex": "/a.*"}}, {"prefix_rewrite": "/b"}, "/axx?q=1", "/b?q=1"),
        (
            {"prefix": "/"},
            {"regex_rewrite": {"pattern": {"regex": "/(\\w+)/(\\w+)"}, "substitution": "/\\2\\\\\\1"}},
            "/a/b?c",
            "/b\\a?c",
        ),
    ],
)
def test_rewritten_paths(match: dict[str, Any], rewrite: dict[str, Any], path: str, rewritten: str) -> None:
    (route,) = _one({"route": {"cluster": "a", **rewrite}}, match).virtual_hosts[0].routes
    assert matcher.rewritten_path(route, path) == rewritten


def test_no_pattern_takes_longer_than_its_text() -> None:
    """Nested repetition, which a matcher that tries everything would be at for minutes; and what RE2 alone spells so."""
    head = parse_request_head(b"GET /" + b"a" * 64 + b" HTTP/1.1\r\nhost: a\r\n\r\n")
    slow = _one({"route": {"cluster": "a"}}, {"safe_regex": {"regex": r"/([a-z]+)*!"}})
    assert matcher.find_route(slow, head, 0) is None
    found = _one({"route": {"cluster": "a"}}, {"safe_regex": {"regex": r"/[[:lower:]]+\z"}})
    assert matcher.find_route(found, head, 0) is not None
    with pytest.raises(ConversionError, match="safe_regex"):
        _one({"route": {"cluster": "a"}}, {"safe_regex": {"regex": "/(?=a)"}})


def test_connect_is_matched_by_connect_matcher_only() -> None:
    head = parse_request_head(b"CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n")
    assert (
        matcher.find_route(_one({"route": {"cluster": "a"}}, {"safe_regex": {"regex": ".*"}}), head, 0)
        is None
    )
    assert matcher.find_route(_one({"route": {"cluster": "a"}}, {"connect_matcher": {}}), head, 0) is not None


def test_a_range_of_plain_numbers() -> None:
    ranged = {"prefix": "/", "headers": [{"name": "n", "range_match": {"start": 5, "end": 20}}]}
    table = _one({"route": {"cluster": "a"}}, ranged)
    for value, matched in ((b"10", True), (b"1_0", False), (b"20", False), (b"x", False)):
        head = parse_request_head(b"GET / HTTP/1.1\r\nhost: a\r\nn: %b\r\n\r\n" % value)
        assert (matcher.find_route(table, head, 0) is not None) == matched, value


def test_query_parameters_are_matched_as_they_are_written() -> None:
    wanted = {"prefix": "/", "query_parameters": [{"name": "a", "string_match": {"exact": "b"}}]}
    table = _one({"route": {"cluster": "a"}}, wanted)
    for query, matched in ((b"x&a=b", True), (b"a=%62", False), (b"a=c&a=b", False), (b"a", False)):
        head = parse_request_head(b"GET /?%b HTTP/1.1\r\nhost: a\r\n\r\n" % query)
        assert (matcher.find_route(table, head, 0) is not None) == matched, query
