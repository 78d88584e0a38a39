"""Route tables as Envoy's route configurations."""

from __future__ import annotations

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2
from envoy.type.matcher.v3 import regex_pb2, string_pb2
from google.protobuf import wrappers_pb2

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
    RouteTable,
    StringMatch,
)
from controlplane.xds.types import milliseconds, pack

_REDIRECT_CODES = {
    301: route_components_pb2.RedirectAction.MOVED_PERMANENTLY,
    302: route_components_pb2.RedirectAction.FOUND,
    303: route_components_pb2.RedirectAction.SEE_OTHER,
    307: route_components_pb2.RedirectAction.TEMPORARY_REDIRECT,
    308: route_components_pb2.RedirectAction.PERMANENT_REDIRECT,
}
#: How often a retry draws again for a host that was not tried (Istio's figure).
_HOST_SELECTION_ATTEMPTS = 5


def route_configuration(table: RouteTable) -> route_pb2.RouteConfiguration:
    """One virtual host for every authority: the address that the client dialled has chosen the service."""
    host = route_components_pb2.VirtualHost(
        name=table.name, domains=["*"], routes=[_route(r) for r in table.routes]
    )
    return route_pb2.RouteConfiguration(
        name=table.name, virtual_hosts=[host], validate_clusters=wrappers_pb2.BoolValue(value=False)
    )


def _route(route: Route) -> route_components_pb2.Route:
    result = route_components_pb2.Route(name=route.name, match=_match(route.match))
    match route.action:
        case Forward():
            result.route.CopyFrom(_forward(route.action))
        case Redirect():
            result.redirect.CopyFrom(_redirect(route.action))
        case Respond():
            result.direct_response.status = route.action.status
            if route.action.body:
                result.direct_response.body.inline_bytes = route.action.body
    _change_headers(result, route.headers)
    return result


def _match(match: RouteMatch) -> route_components_pb2.RouteMatch:
    result = route_components_pb2.RouteMatch(
        headers=[_header(h) for h in match.headers], query_parameters=[_query(q) for q in match.query]
    )
    match match.path.kind:
        case MatchKind.EXACT:
            result.path = match.path.value
        case MatchKind.REGEX:
            result.safe_regex.regex = match.path.value
        case _:
            result.prefix = match.path.value
    if match.path.ignore_case:
        result.case_sensitive.value = False
    return result


def _header(header: HeaderMatch) -> route_components_pb2.HeaderMatcher:
    result = route_components_pb2.HeaderMatcher(name=header.name, invert_match=header.invert)
    if header.match.kind is MatchKind.PRESENT:
        result.present_match = True
    else:
        result.string_match.CopyFrom(_string(header.match))
        # "Without this value" holds for a request without the header too.
        result.treat_missing_header_as_empty = header.invert
    return result


def _query(query: QueryMatch) -> route_components_pb2.QueryParameterMatcher:
    result = route_components_pb2.QueryParameterMatcher(name=query.name)
    if query.match.kind is MatchKind.PRESENT:
        result.present_match = True
    else:
        result.string_match.CopyFrom(_string(query.match))
    return result


def _string(match: StringMatch) -> string_pb2.StringMatcher:
    if match.kind is MatchKind.REGEX:
        return string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex=match.value))
    return string_pb2.StringMatcher(**{match.kind.value: match.value}, ignore_case=match.ignore_case)


def _forward(forward: Forward) -> route_components_pb2.RouteAction:
    result = route_components_pb2.RouteAction(timeout=milliseconds(forward.timeout))
    if len(forward.clusters) == 1 and forward.clusters[0].headers is None:
        result.cluster = forward.clusters[0].cluster
    else:
        for weighted in forward.clusters:
            cluster = result.weighted_clusters.clusters.add(name=weighted.cluster)
            cluster.weight.value = weighted.weight
            _change_headers(cluster, weighted.headers)
    if forward.retry:
        result.retry_policy.CopyFrom(_retry(forward.retry))
    if forward.rewrite_prefix is not None:
        result.prefix_rewrite = forward.rewrite_prefix
    elif forward.rewrite_regex is not None:
        result.regex_rewrite.pattern.regex, result.regex_rewrite.substitution = forward.rewrite_regex
    if forward.rewrite_authority is not None:
        result.host_rewrite_literal = forward.rewrite_authority
    return result


def _retry(retry: RetryPolicy) -> route_components_pb2.RetryPolicy:
    result = route_components_pb2.RetryPolicy(
        retry_on=",".join(retry.conditions),
        num_retries=wrappers_pb2.UInt32Value(value=retry.attempts),
        retriable_status_codes=retry.status_codes,
    )
    if retry.per_try_timeout is not None:
        result.per_try_timeout.CopyFrom(milliseconds(retry.per_try_timeout))
    if retry.backoff is not None:
        result.retry_back_off.base_interval.CopyFrom(milliseconds(retry.backoff))
    if retry.previous_hosts:
        result.retry_host_predicate.add(
            name="envoy.retry_host_predicates.previous_hosts",
            typed_config=pack(previous_hosts_pb2.PreviousHostsPredicate()),
        )
        result.host_selection_retry_max_attempts = _HOST_SELECTION_ATTEMPTS
    return result


def _redirect(redirect: Redirect) -> route_components_pb2.RedirectAction:
    result = route_components_pb2.RedirectAction(response_code=_REDIRECT_CODES[redirect.code])
    if redirect.authority is not None:
        result.host_redirect = redirect.authority
    if redirect.scheme is not None:
        result.scheme_redirect = redirect.scheme
    if redirect.port is not None:
        result.port_redirect = redirect.port
    if redirect.path is not None:
        result.path_redirect = redirect.path
    elif redirect.prefix is not None:
        result.prefix_rewrite = redirect.prefix
    return result


def _change_headers(
    target: route_components_pb2.Route | route_components_pb2.WeightedCluster.ClusterWeight,
    changes: HeaderChanges | None,
) -> None:
    if changes is None:
        return
    options = base_pb2.HeaderValueOption
    for name, pairs, append in (
        ("request_headers_to_add", changes.request_set, options.OVERWRITE_IF_EXISTS_OR_ADD),
        ("request_headers_to_add", changes.request_add, options.APPEND_IF_EXISTS_OR_ADD),
        ("response_headers_to_add", changes.response_set, options.OVERWRITE_IF_EXISTS_OR_ADD),
        ("response_headers_to_add", changes.response_add, options.APPEND_IF_EXISTS_OR_ADD),
    ):
        for key, value in pairs:
            getattr(target, name).add(header=base_pb2.HeaderValue(key=key, value=value), append_action=append)
    target.request_headers_to_remove.extend(changes.request_remove)
    target.response_headers_to_remove.extend(changes.response_remove)
