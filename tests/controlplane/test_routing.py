"""VirtualServices and DestinationRules: route tables, clusters, and what is said where something is missing."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.api import ServicePort
from controlplane.istio.hosts import closeness, resolve
from controlplane.istio.virtualservice import DEFAULT_RETRY
from controlplane.model.routing import (
    Balancing,
    Forward,
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
)
from controlplane.model.snapshot import Snapshot
from tests.controlplane.support import (
    Manifest,
    compile_all,
    istio,
    mesh_namespace,
    messages,
    pod,
    service,
    subsets,
    two_versions,
)

TABLE = "web-app.default.svc.cluster.local:80"
OWN = "outbound|80||web-app.default.svc.cluster.local"


def to(host: str = "web-app", subset: str = "", port: int = 0, **more: Any) -> Manifest:
    destination: Manifest = {"host": host}
    if subset:
        destination["subset"] = subset
    if port:
        destination["port"] = {"number": port}
    return {"destination": destination, **more}


def virtual(
    *http: Manifest,
    hosts: tuple[str, ...] = ("web-app",),
    name: str = "web",
    ns: str = "default",
    **spec: Any,
) -> Manifest:
    return istio("VirtualService", name, {"hosts": list(hosts), "http": list(http), **spec}, ns)


def routes(*http: Manifest) -> tuple[Route, ...]:
    return compile_all(*two_versions(), subsets("web-app", "v1", "v2"), virtual(*http)).tables[TABLE].routes


def forward(**http: Any) -> Forward:
    (route,) = routes({"route": [to()], **http})
    assert isinstance(route.action, Forward)
    return route.action


def l7_ports(snapshot: Snapshot, name: str = "web-app") -> list[int]:
    return [p.port for p in snapshot.services["default", name].ports if p.l7]


def clusters_of(route: Route) -> list[tuple[str, int]]:
    assert isinstance(route.action, Forward)
    return [(w.cluster, w.weight) for w in route.action.clusters]


# -- which ports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("port", "routed"),
    [
        ({"name": "http"}, True),
        ({"name": "http-web"}, True),
        ({"name": "http2"}, True),
        ({"name": "grpc-api"}, True),
        ({"name": "web"}, True),
        ({}, True),
        ({"name": "web", "appProtocol": "http"}, True),
        ({"name": "tcp"}, False),
        ({"name": "tls-x"}, False),
        ({"name": "https"}, False),
        ({"name": "mysql"}, False),
        ({"name": "http", "appProtocol": "tcp"}, False),
        ({"name": "http", "protocol": "UDP"}, False),
    ],
)
def test_which_ports_are_routed(port: Manifest, routed: bool) -> None:
    manifests = two_versions()
    manifests[1] = service("web-app", ports=[{"port": 80, **port}])
    snapshot = compile_all(*manifests, virtual({"route": [to()]}))
    assert l7_ports(snapshot) == ([80] if routed else [])
    if not routed and port.get("protocol") != "UDP":
        assert "says of itself that it is not HTTP" in messages(snapshot, "VirtualService")


@pytest.mark.parametrize(("name", "routed"), [("http", True), ("grpc", True), ("web", False), ("tcp", False)])
def test_balancing_alone_routes_ports_that_say_http(name: str, routed: bool) -> None:
    """An unnamed port might carry anything: only a VirtualService says that it is HTTP."""
    manifests = two_versions()
    manifests[1] = service("web-app", ports=[{"port": 80, "name": name}])
    rule = istio(
        "DestinationRule",
        "d",
        {"host": "web-app", "trafficPolicy": {"loadBalancer": {"simple": "ROUND_ROBIN"}}},
    )
    snapshot = compile_all(*manifests, rule)
    assert l7_ports(snapshot) == ([80] if routed else [])
    if routed:
        (route,) = snapshot.tables[TABLE].routes
        assert route == Route(RouteMatch(), Forward((Weighted(OWN, 100),), retry=DEFAULT_RETRY), "default")
        assert snapshot.clusters[OWN].balancing is Balancing.ROUND_ROBIN
        assert snapshot.clusters[OWN].http2 is (name == "grpc")


def test_no_rules_no_l7() -> None:
    snapshot = compile_all(*two_versions(), subsets("web-app", "v1"))
    assert l7_ports(snapshot) == []
    assert not snapshot.tables
    assert not snapshot.clusters


def test_a_headless_service_is_not_routed_and_says_so() -> None:
    manifests = two_versions()
    manifests[1] = service("web-app", None)
    snapshot = compile_all(*manifests, virtual({"route": [to()]}))
    assert l7_ports(snapshot) == []
    assert "has no cluster address" in messages(snapshot)


def test_routes_for_one_port_leave_the_others_alone() -> None:
    manifests = two_versions()
    ports = [{"name": "http", "port": 80}, {"name": "http-b", "port": 81}]
    manifests[1] = service("web-app", ports=ports)
    snapshot = compile_all(*manifests, virtual({"match": [{"port": 81}], "route": [to()]}))
    assert l7_ports(snapshot) == [81]
    (route,) = snapshot.tables["web-app.default.svc.cluster.local:81"].routes
    assert clusters_of(route) == [("outbound|81||web-app.default.svc.cluster.local", 100)]


def test_gateways_only_is_not_the_mesh() -> None:
    snapshot = compile_all(*two_versions(), virtual({"route": [to()]}, gateways=["bookinfo"]))
    assert l7_ports(snapshot) == []
    assert "routes of gateways are accepted, not in force yet" in messages(snapshot)
    assert l7_ports(compile_all(*two_versions(), virtual({"route": [to()]}, gateways=["x", "mesh"]))) == [80]


# -- hosts -------------------------------------------------------------------------------------------------------------------


def test_host_names() -> None:
    assert resolve("web", "shop") == "web.shop.svc.cluster.local"
    assert resolve("web.shop", "other") == "web.shop"
    assert resolve("*.shop.svc.cluster.local", "x") == "*.shop.svc.cluster.local"
    host = "web.shop.svc.cluster.local"
    order = ["*", "*.cluster.local", "*.shop.svc.cluster.local", host]
    assert max(order, key=lambda p: closeness(p, host)) == host
    assert sorted([order[i] for i in (3, 1, 0, 2)], key=lambda p: closeness(p, host)) == order
    assert closeness("*.shop.svc.cluster.local", "shop.svc.cluster.local") == 0
    assert closeness("b.shop.svc.cluster.local", host) == 0


def test_the_closest_host_wins_then_the_oldest() -> None:
    star = virtual({"directResponse": {"status": 201}}, hosts=("*",), name="star")
    wide = virtual({"directResponse": {"status": 202}}, hosts=("*.default.svc.cluster.local",), name="wide")
    exact = virtual({"directResponse": {"status": 203}}, name="exact")
    older = virtual({"directResponse": {"status": 204}}, name="older")
    older["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
    exact["metadata"]["creationTimestamp"] = "2021-01-01T00:00:00Z"

    def answer(*virtual_services: Manifest) -> int:
        action = compile_all(*two_versions(), *virtual_services).tables[TABLE].routes[0].action
        assert isinstance(action, Respond)
        return action.status

    assert answer(star) == 201
    assert answer(wide, star) == 202
    assert answer(star, exact, wide) == 203
    assert answer(exact, older) == 204
    assert "is older and is the one for" in messages(
        compile_all(*two_versions(), exact, older), "default/exact"
    )


def test_a_host_that_is_no_service_is_said() -> None:
    assert "no service has the host nobody.default" in messages(
        compile_all(*two_versions(), virtual({"route": [to()]}, hosts=("nobody",)))
    )


@pytest.mark.parametrize(
    ("ns", "host", "applies"),
    [
        ("default", "web-app", True),
        ("default", "*.default.svc.cluster.local", True),
        ("istio-system", "web-app.default.svc.cluster.local", True),
        ("clients", "web-app.default.svc.cluster.local", False),
        ("default", "other", False),
    ],
)
def test_where_destination_rules_are_looked_for(ns: str, host: str, applies: bool) -> None:
    rule = istio(
        "DestinationRule", "d", {"host": host, "subsets": [{"name": "v1", "labels": {"version": "v1"}}]}, ns
    )
    snapshot = compile_all(*two_versions(), rule, virtual({"route": [to(subset="v1")]}))
    assert ("outbound|80|v1|web-app.default.svc.cluster.local" in snapshot.clusters) is applies
    if ns == "clients":
        assert "in the namespace of the clients only" in messages(snapshot)


def test_destination_rules_of_one_host_are_merged() -> None:
    first, second = subsets("web-app", "v1"), subsets("web-app", "v1", "v2")
    first["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
    second["metadata"] |= {"name": "second", "creationTimestamp": "2021-01-01T00:00:00Z"}
    snapshot = compile_all(*two_versions(), first, second, virtual({"route": [to(subset="v2")]}))
    assert "outbound|80|v2|web-app.default.svc.cluster.local" in snapshot.clusters
    assert "subset v1 is already defined" in messages(snapshot, "default/second")


def test_balancing_by_port_and_subset() -> None:
    rule = subsets(
        "web-app",
        "v1",
        trafficPolicy={
            "loadBalancer": {"simple": "RANDOM"},
            "portLevelSettings": [{"port": {"number": 80}, "loadBalancer": {"simple": "ROUND_ROBIN"}}],
        },
    )
    rule["spec"]["subsets"][0]["trafficPolicy"] = {"loadBalancer": {"simple": "LEAST_CONN"}}
    snapshot = compile_all(*two_versions(), rule, virtual({"route": [to(subset="v1")]}))
    assert snapshot.clusters[OWN].balancing is Balancing.ROUND_ROBIN
    assert (
        snapshot.clusters["outbound|80|v1|web-app.default.svc.cluster.local"].balancing
        is Balancing.LEAST_REQUEST
    )


def test_settings_of_a_port_inherit_nothing() -> None:
    policy = {"loadBalancer": {"simple": "RANDOM"}, "portLevelSettings": [{"port": {"number": 80}}]}
    rule = subsets("web-app", "v1", trafficPolicy=policy)
    snapshot = compile_all(*two_versions(), rule, virtual({"route": [to(subset="v1")]}))
    assert {c.balancing for c in snapshot.clusters.values()} == {Balancing.LEAST_REQUEST}


def test_the_only_destination_gets_all_whatever_its_weight() -> None:
    (route,) = compile_all(*two_versions(), virtual({"route": [to(weight=0)]})).tables[TABLE].routes
    assert clusters_of(route) == [(OWN, 100)]


def test_a_rule_for_some_callers_is_no_rule_for_all() -> None:
    rule = subsets("web-app", "v1", workloadSelector={"matchLabels": {"app": "client"}})
    snapshot = compile_all(*two_versions(), rule, virtual({"route": [to(subset="v1")]}))
    assert "no DestinationRule defines subset v1" in messages(snapshot)
    assert "spec.workloadSelector" in messages(snapshot, "DestinationRule")


@pytest.mark.parametrize(
    ("ns", "exported", "applies"),
    [
        ("clients", ["."], False),
        ("clients", ["clients", "more"], False),
        ("clients", ["*"], True),
        ("clients", [], True),
        ("default", ["."], True),
    ],
)
def test_routes_that_a_namespace_keeps_to_itself_are_not_everybodys(
    ns: str, exported: list[str], applies: bool
) -> None:
    spec = {
        "hosts": ["web-app.default.svc.cluster.local"],
        "exportTo": exported,
        "http": [{"directResponse": {"status": 418}}],
    }
    snapshot = compile_all(*two_versions(), istio("VirtualService", "v", spec, ns))
    assert (TABLE in snapshot.tables) is applies
    assert ("spec.exportTo" in messages(snapshot)) is (bool(exported) and "*" not in exported)


def test_a_rule_of_the_root_namespace_for_itself_is_not_everybodys() -> None:
    spec = {"host": "*.local", "exportTo": ["."], "trafficPolicy": {"loadBalancer": {"simple": "RANDOM"}}}
    snapshot = compile_all(*two_versions(), istio("DestinationRule", "d", spec, "istio-system"))
    assert not snapshot.tables


def test_policies_that_are_not_in_force_say_so() -> None:
    rule = subsets(
        "web-app",
        "v1",
        trafficPolicy={
            "connectionPool": {"tcp": {"maxConnections": 1}},
            "outlierDetection": {"consecutive5xxErrors": 1},
            "tls": {"mode": "SIMPLE"},
            "loadBalancer": {"simple": "PASSTHROUGH"},
        },
    )
    text = messages(compile_all(*two_versions(), rule))
    for field in ("connectionPool", "outlierDetection", "tls", "loadBalancer.simple"):
        assert f"spec.trafficPolicy.{field}" in text


# -- destinations ------------------------------------------------------------------------------------------------------------


def test_destinations_that_cannot_be() -> None:
    manifests = [
        *two_versions(),
        subsets("web-app", "v1", "v9"),
        service("two", "10.96.0.12", [{"name": "a", "port": 1}, {"name": "b", "port": 2}]),
    ]
    http = {
        "route": [
            to("nobody", weight=1),
            to("two", weight=1),
            to("two", port=2, weight=1),
            to(subset="v9", weight=1),
        ]
    }
    snapshot = compile_all(*manifests, virtual(http))
    (route,) = snapshot.tables[TABLE].routes
    assert [c for c, _ in clusters_of(route)] == [
        "outbound|80||nobody.default.svc.cluster.local",
        "outbound|80||two.default.svc.cluster.local",
        "outbound|2||two.default.svc.cluster.local",
        "outbound|80|v9|web-app.default.svc.cluster.local",
    ]
    assert set(snapshot.clusters) == {
        OWN,
        "outbound|2||two.default.svc.cluster.local",
        "outbound|80|v9|web-app.default.svc.cluster.local",
    }
    text = messages(snapshot)
    assert (
        "no service has the host nobody.default.svc.cluster.local: requests that are routed there are answered 503"
        in text
    )
    assert "has no port 80 (it has 1, 2)" in text
    assert "subset v9 of web-app.default.svc.cluster.local selects no pod" in text


def test_a_service_of_one_port_needs_no_port() -> None:
    other = service("other", "10.96.0.12", [{"name": "http", "port": 9000, "targetPort": 9001}], ns="shop")
    snapshot = compile_all(
        *two_versions(),
        other,
        pod("o", "10.1.0.7", ns="shop", app="other"),
        virtual({"route": [to("other.shop.svc.cluster.local")]}),
    )
    (endpoint,) = snapshot.clusters["outbound|9000||other.shop.svc.cluster.local"].endpoints
    assert (endpoint.address, endpoint.port, endpoint.enrolled) == ("10.1.0.7", 9001, False)


def test_weights() -> None:
    (route,) = routes({"route": [to(subset="v1", weight=0), to(subset="v2", weight=7), to(weight=3)]})
    assert [w for _, w in clusters_of(route)] == [7, 3]


# -- matches and actions -----------------------------------------------------------------------------------------------------


def test_matches() -> None:
    every = {
        "uri": {"prefix": "/a"},
        "method": {"exact": "GET"},
        "authority": {"regex": "a.*"},
        "scheme": {"exact": "http"},
        "headers": {"X-B": {"prefix": "b"}, "a": {}, "c": {"regex": "*"}},
        "withoutHeaders": {"d": {"exact": "1"}, "e": {}},
        "queryParams": {"q": {"exact": "1"}, "r": {"regex": ".+"}},
    }
    (route, _) = routes({"match": [every], "route": [to()]}, {"route": [to()]})
    present = StringMatch(MatchKind.PRESENT)
    assert route.match == RouteMatch(
        StringMatch(MatchKind.PREFIX, "/a"),
        (
            HeaderMatch(":method", StringMatch(MatchKind.EXACT, "GET")),
            HeaderMatch(":authority", StringMatch(MatchKind.REGEX, "a.*")),
            HeaderMatch(":scheme", StringMatch(MatchKind.EXACT, "http")),
            HeaderMatch("x-b", StringMatch(MatchKind.PREFIX, "b")),
            HeaderMatch("a", present),
            HeaderMatch("c", present),
            HeaderMatch("d", StringMatch(MatchKind.EXACT, "1"), invert=True),
            HeaderMatch("e", present, invert=True),
        ),
        (
            QueryMatch("q", StringMatch(MatchKind.EXACT, "1")),
            QueryMatch("r", StringMatch(MatchKind.REGEX, ".+")),
        ),
    )


def test_order_and_what_is_never_reached() -> None:
    match = [{"uri": {"exact": "/A"}, "ignoreUriCase": True}, {"uri": {"regex": "/b.*"}, "name": "b"}]
    snapshot = compile_all(
        *two_versions(),
        virtual(
            {"name": "first", "match": match, "route": [to()]},
            {"route": [to()]},
            {"match": [{"uri": {"exact": "/c"}}], "route": [to()]},
        ),
    )
    found = snapshot.tables[TABLE].routes
    assert [(r.name, r.match.path) for r in found] == [
        ("first", StringMatch(MatchKind.EXACT, "/A", ignore_case=True)),
        ("first-b", StringMatch(MatchKind.REGEX, "/b.*")),
        ("", StringMatch(MatchKind.PREFIX, "/")),
    ]
    assert "spec.http[2]: never reached" in messages(snapshot)


def test_conditions_that_are_not_in_force_match_nothing() -> None:
    only = {"match": [{"sourceLabels": {"app": "x"}}, {"gateways": ["gw"]}], "route": [to(subset="v1")]}
    snapshot = compile_all(*two_versions(), subsets("web-app", "v1"), virtual(only, {"route": [to()]}))
    (route,) = snapshot.tables[TABLE].routes
    assert clusters_of(route) == [(OWN, 100)]
    assert "spec.http[0].match[0].sourceLabels: routing by who calls is not in force yet" in messages(
        snapshot
    )


@pytest.mark.parametrize(
    ("retries", "expected"),
    [
        (None, DEFAULT_RETRY),
        ({"attempts": 0}, None),
        ({"perTryTimeout": "1s"}, None),
        ({"attempts": 1, "retryOn": "503, 5xx"}, RetryPolicy(1, ("5xx", "retriable-status-codes"), (503,))),
        (
            {"attempts": 4, "backoff": "25ms", "retryIgnorePreviousHosts": False},
            RetryPolicy(4, DEFAULT_RETRY.conditions, backoff=25, previous_hosts=False),
        ),
    ],
)
def test_retries(retries: Manifest | None, expected: RetryPolicy | None) -> None:
    assert forward(**({"retries": retries} if retries is not None else {})).retry == expected


def test_rewrites_redirects_responses() -> None:
    assert forward().timeout == 0
    assert forward(timeout="1.5s").timeout == 1500
    assert forward(rewrite={"uri": "/x", "authority": "h"}) == Forward(
        (Weighted(OWN, 100),), 0, DEFAULT_RETRY, rewrite_prefix="/x", rewrite_authority="h"
    )
    assert forward(rewrite={"uriRegexRewrite": {"match": "a", "rewrite": "b"}}).rewrite_regex == ("a", "b")
    assert forward(headers={"request": {"set": {"Host": "h"}}}).rewrite_authority == "h"
    (redirect, respond) = routes(
        {
            "match": [{"uri": {"exact": "/r"}}],
            "redirect": {"uri": "/n", "authority": "a", "redirectCode": 302, "port": 81, "scheme": "https"},
        },
        {"directResponse": {"status": 404, "body": {"bytes": "aGk="}}},
    )
    assert redirect.action == Redirect(302, "/n", None, "a", "https", 81)
    assert respond.action == Respond(404, b"hi")


def test_header_changes() -> None:
    headers = {"request": {"set": {"a": "1"}, "remove": ["b"]}, "response": {"add": {"c": "2"}}}
    (route,) = routes({"headers": headers, "route": [to(headers={"response": {"set": {"d": "3"}}})]})
    assert route.headers is not None
    assert (route.headers.request_set, route.headers.request_remove) == ((("a", "1"),), ("b",))
    assert route.headers.response_add == (("c", "2"),)
    assert isinstance(route.action, Forward)
    assert route.action.clusters[0].headers is not None


def test_actions_that_are_not_in_force_say_so() -> None:
    http = {
        "fault": {"abort": {"httpStatus": 500, "percentage": {"value": 100}}},
        "mirror": {"host": "web-app"},
        "corsPolicy": {"maxAge": "1s"},
        "route": [to()],
    }
    text = messages(compile_all(*two_versions(), virtual(http)))
    for field in ("fault", "mirror", "corsPolicy"):
        assert f"spec.http[0].{field}:" in text
    layer4 = istio(
        "VirtualService",
        "t",
        {"hosts": ["web-app"], "tls": [{"match": [{"sniHosts": ["a"]}], "route": [to()]}]},
    )
    assert "tls routes: accepted, not in force yet" in messages(compile_all(*two_versions(), layer4))


def test_the_contract_of_a_port() -> None:
    snapshot = compile_all(mesh_namespace(), *two_versions()[1:], virtual({"route": [to()]}))
    (port,) = snapshot.services["default", "web-app"].ports
    assert isinstance(port, ServicePort)
    assert port.l7
    assert [e.address for e in port.endpoints] == ["10.1.0.1", "10.2.0.2"], (
        "L4 endpoints stay: who is not enrolled needs them"
    )
