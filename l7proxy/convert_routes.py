"""RouteConfiguration (Envoy v3) to :class:`l7proxy.model.RouteTable`.

Owns the checks of routes. A match that is not supported is refused: skipping it would send requests somewhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import MappingProxyType

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.type.matcher.v3 import regex_pb2, string_pb2
from google.protobuf import duration_pb2

from l7proxy import model
from l7proxy.errors import ConversionError
from l7proxy.regex import Pattern, RegexError, Rewrite

#: Envoy's retry_on names (x-envoy-retry-on, x-envoy-retry-grpc-on) that this proxy acts on. Istio's lists may hold codes too.
RETRY_ON = frozenset(
    {
        "5xx",
        "gateway-error",
        "reset",
        "reset-before-request",
        "connect-failure",
        "refused-stream",
        "retriable-4xx",
    }
    | {
        "retriable-status-codes",
        "envoy-ratelimited",
        "cancelled",
        "deadline-exceeded",
        "internal",
        "resource-exhausted",
    }
    | {"unavailable"}
)
#: Accepted and without effect here: HTTP/3, and response headers that policies name elsewhere.
_RETRY_ON_IGNORED = frozenset({"http3-post-connect-failure", "retriable-headers"})
_PREVIOUS_HOSTS = "envoy.retry_host_predicates.previous_hosts"
#: Headers that say where a message goes and where it ends: this proxy's own to write.
_FRAMING = frozenset({"host", "content-length", "transfer-encoding", "connection"})
_REDIRECTS = {0: 301, 1: 302, 2: 303, 3: 307, 4: 308}


def seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def route_table(message: route_pb2.RouteConfiguration) -> model.RouteTable:
    """:raises ConversionError: a part cannot be converted; the message names the field."""
    hosts: list[model.VirtualHost] = []
    exact: dict[str, model.VirtualHost] = {}
    suffixes: dict[str, model.VirtualHost] = {}
    prefixes: dict[str, model.VirtualHost] = {}
    default: model.VirtualHost | None = None
    if message.HasField("vhds"):
        raise ConversionError("vhds: not supported")
    shared = (
        _mutation(message.request_headers_to_add, message.request_headers_to_remove),
        _mutation(message.response_headers_to_add, message.response_headers_to_remove),
    )
    for i, item in enumerate(message.virtual_hosts):
        at = f"virtual_hosts[{i}]"
        host = _virtual_host(item, at, shared)
        hosts.append(host)
        if not item.domains:
            raise ConversionError(f"{at}.domains: empty")
        for domain in host.domains:
            if domain == "*":
                taken, default = default is not None, host
            else:
                target, key = exact, domain
                if domain.startswith("*"):
                    target, key = suffixes, domain[1:]
                elif domain.endswith("*"):
                    target, key = prefixes, domain[:-1]
                if "*" in key:
                    raise ConversionError(f"{at}.domains: {domain!r}: a star only at one end")
                taken = key in target
                target[key] = host
            if taken:
                raise ConversionError(f"{at}.domains: {domain!r} is in two virtual hosts")
    return model.RouteTable(
        name=message.name,
        virtual_hosts=tuple(hosts),
        exact=MappingProxyType(exact),
        suffixes=tuple(sorted(suffixes.items(), key=lambda pair: -len(pair[0]))),
        prefixes=tuple(sorted(prefixes.items(), key=lambda pair: -len(pair[0]))),
        default=default,
        clusters=frozenset(
            choice.name for host in hosts for route in host.routes for choice in route.clusters
        ),
    )


Mutations = tuple[model.HeaderMutation, model.HeaderMutation]


def _virtual_host(message: route_components_pb2.VirtualHost, at: str, shared: Mutations) -> model.VirtualHost:
    if message.HasField("matcher"):
        raise ConversionError(f"{at}.matcher: not supported")
    # Envoy evaluates the most specific level first: route, virtual host, route configuration.
    mutations = (
        _join(_mutation(message.request_headers_to_add, message.request_headers_to_remove), shared[0]),
        _join(_mutation(message.response_headers_to_add, message.response_headers_to_remove), shared[1]),
    )
    retry = _retry(message.retry_policy, f"{at}.retry_policy") if message.HasField("retry_policy") else None
    routes = [
        _route(route, f"{at}.routes[{i}]", mutations, retry, message.include_request_attempt_count)
        for i, route in enumerate(message.routes)
    ]
    return model.VirtualHost(
        name=message.name,
        domains=tuple(domain.lower() for domain in message.domains),
        routes=tuple(routes),
        require_tls=list(model.TlsRequirement)[message.require_tls],
    )


def _route(
    message: route_components_pb2.Route,
    at: str,
    shared: Mutations,
    shared_retry: model.RetryPolicy | None,
    attempt_count: bool,
) -> model.Route:
    match = _match(message.match, f"{at}.match")
    request_headers = _join(
        _mutation(message.request_headers_to_add, message.request_headers_to_remove), shared[0]
    )
    response_headers = _join(
        _mutation(message.response_headers_to_add, message.response_headers_to_remove), shared[1]
    )
    kind = message.WhichOneof("action")
    if kind == "redirect":
        return model.Route(
            message.name,
            match,
            redirect=_redirect(message.redirect, f"{at}.redirect"),
            response_headers=response_headers,
        )
    if kind == "direct_response":
        body = message.direct_response.body
        data = body.inline_bytes or body.inline_string.encode()
        if body.WhichOneof("specifier") not in (None, "inline_bytes", "inline_string"):
            raise ConversionError(f"{at}.direct_response.body: only inline bodies are supported")
        status = message.direct_response.status
        if not 200 <= status < 600:
            raise ConversionError(f"{at}.direct_response.status: {status} is not from 200 to 599")
        return model.Route(
            message.name,
            match,
            direct=model.DirectResponse(status, data),
            response_headers=response_headers,
        )
    if kind != "route":
        raise ConversionError(f"{at}.action: {kind} is not supported")
    action = message.route
    clusters, total = _clusters(action, f"{at}.route")
    retry = (
        _retry(action.retry_policy, f"{at}.route.retry_policy")
        if action.HasField("retry_policy")
        else shared_retry
    )
    regex_rewrite = None
    if action.HasField("regex_rewrite"):
        pattern = _regex(action.regex_rewrite.pattern, f"{at}.route.regex_rewrite.pattern")
        regex_rewrite = _rewrite(
            pattern, action.regex_rewrite.substitution, f"{at}.route.regex_rewrite.substitution"
        )
    rewrite = action.WhichOneof("host_rewrite_specifier")
    if rewrite not in (None, "host_rewrite_literal", "auto_host_rewrite"):
        raise ConversionError(f"{at}.route.{rewrite}: not supported")
    not_found = {1: 404, 2: 500}.get(action.cluster_not_found_response_code, 503)
    cluster_mutations = any(c.request_headers for c in clusters)
    plain = not (request_headers or cluster_mutations or action.prefix_rewrite or regex_rewrite or rewrite)
    return model.Route(
        name=message.name,
        match=match,
        clusters=clusters,
        total_weight=total,
        cluster_header=action.cluster_header.lower().encode()
        if action.WhichOneof("cluster_specifier") == "cluster_header"
        else b"",
        cluster_not_found=not_found,
        timeout=seconds(action.timeout) if action.HasField("timeout") else 15.0,
        retry=retry,
        prefix_rewrite=_visible(action.prefix_rewrite, f"{at}.route.prefix_rewrite"),
        regex_rewrite=regex_rewrite,
        host_rewrite=_visible(action.host_rewrite_literal, f"{at}.route.host_rewrite_literal"),
        auto_host_rewrite=action.auto_host_rewrite.value,
        request_headers=request_headers,
        response_headers=response_headers,
        attempt_count=attempt_count,
        plain=plain,
    )


def _clusters(
    action: route_components_pb2.RouteAction, at: str
) -> tuple[tuple[model.WeightedCluster, ...], int]:
    kind = action.WhichOneof("cluster_specifier")
    if kind == "cluster":
        return (model.WeightedCluster(action.cluster, 1),), 1
    if kind == "cluster_header":
        return (), 0
    if kind != "weighted_clusters":
        raise ConversionError(f"{at}.cluster_specifier: {kind} is not supported")
    choices = []
    for i, item in enumerate(action.weighted_clusters.clusters):
        if not item.name:
            raise ConversionError(f"{at}.weighted_clusters.clusters[{i}].name: empty")
        choices.append(
            model.WeightedCluster(
                item.name,
                item.weight.value,
                _mutation(item.request_headers_to_add, item.request_headers_to_remove),
                _mutation(item.response_headers_to_add, item.response_headers_to_remove),
            )
        )
    total = sum(choice.weight for choice in choices)
    if total == 0:
        raise ConversionError(f"{at}.weighted_clusters: the weights add up to 0")
    said = action.weighted_clusters.total_weight.value
    if said and said != total:
        raise ConversionError(
            f"{at}.weighted_clusters.total_weight: {said}, but the weights add up to {total}"
        )
    return tuple(choices), total


def _match(message: route_components_pb2.RouteMatch, at: str) -> model.RouteMatch:
    kind = message.WhichOneof("path_specifier")
    ignore_case = message.HasField("case_sensitive") and not message.case_sensitive.value
    path, regex = "", None
    if kind == "prefix":
        path_kind, path = model.PathKind.PREFIX, message.prefix
    elif kind == "path":
        path_kind, path = model.PathKind.EXACT, message.path
    elif kind == "path_separated_prefix":
        path_kind, path = model.PathKind.SEGMENT_PREFIX, message.path_separated_prefix
    elif kind == "safe_regex":
        path_kind, regex = model.PathKind.REGEX, _regex(message.safe_regex, f"{at}.safe_regex")
    elif kind == "connect_matcher":
        path_kind = model.PathKind.CONNECT
    else:
        raise ConversionError(f"{at}.path_specifier: {kind} is not supported")
    for name in ("tls_context", "dynamic_metadata", "filter_state", "cookies"):
        if name in message.DESCRIPTOR.fields_by_name and _is_set(message, name):
            raise ConversionError(f"{at}.{name}: not supported")
    fraction = 1_000_000
    if message.HasField("runtime_fraction"):
        value = message.runtime_fraction.default_value
        fraction = value.numerator * {0: 10_000, 1: 100, 2: 1}[value.denominator]
    return model.RouteMatch(
        path_kind=path_kind,
        path=path.lower() if ignore_case else path,
        regex=regex,
        ignore_case=ignore_case,
        headers=tuple(_header(h, f"{at}.headers[{i}]") for i, h in enumerate(message.headers)),
        query=tuple(_query(q, f"{at}.query_parameters[{i}]") for i, q in enumerate(message.query_parameters)),
        grpc=message.HasField("grpc"),
        fraction=fraction,
    )


def _is_set(message: route_components_pb2.RouteMatch, name: str) -> bool:
    return any(field.name == name for field, _ in message.ListFields())


def _header(message: route_components_pb2.HeaderMatcher, at: str) -> model.HeaderMatcher:
    if not message.name:
        raise ConversionError(f"{at}.name: empty")
    kind = message.WhichOneof("header_match_specifier")
    name = message.name.lower().encode()
    common = {"invert": message.invert_match, "missing_as_empty": message.treat_missing_header_as_empty}
    if kind is None:
        return model.HeaderMatcher(name, model.MatchKind.PRESENT, **common)
    if kind == "present_match":
        # present_match: false means "absent".
        inverted = message.invert_match != (not message.present_match)
        return model.HeaderMatcher(
            name,
            model.MatchKind.PRESENT,
            invert=inverted,
            missing_as_empty=message.treat_missing_header_as_empty,
        )
    if kind == "range_match":
        bounds = (message.range_match.start, message.range_match.end)
        return model.HeaderMatcher(name, model.MatchKind.RANGE, range=bounds, **common)
    if kind == "string_match":
        what, value, ignore_case, regex = _string(message.string_match, f"{at}.string_match")
        return model.HeaderMatcher(name, what, value, ignore_case, regex=regex, **common)
    if kind == "safe_regex_match":
        regex = _regex(message.safe_regex_match, f"{at}.safe_regex_match")
        return model.HeaderMatcher(name, model.MatchKind.REGEX, regex=regex, **common)
    plain = {
        "exact_match": model.MatchKind.EXACT,
        "prefix_match": model.MatchKind.PREFIX,
        "suffix_match": model.MatchKind.SUFFIX,
        "contains_match": model.MatchKind.CONTAINS,
    }
    return model.HeaderMatcher(name, plain[kind], getattr(message, kind), **common)


def _query(message: route_components_pb2.QueryParameterMatcher, at: str) -> model.QueryMatcher:
    kind = message.WhichOneof("query_parameter_match_specifier")
    if kind == "string_match":
        what, value, ignore_case, regex = _string(message.string_match, f"{at}.string_match")
        return model.QueryMatcher(message.name, what, value, ignore_case, regex)
    if kind == "present_match" and not message.present_match:
        raise ConversionError(f"{at}.present_match: false is not supported")
    return model.QueryMatcher(message.name, model.MatchKind.PRESENT)


def _string(message: string_pb2.StringMatcher, at: str) -> tuple[model.MatchKind, str, bool, Pattern | None]:
    kind = message.WhichOneof("match_pattern")
    if kind == "safe_regex":
        return model.MatchKind.REGEX, "", False, _regex(message.safe_regex, f"{at}.safe_regex")
    kinds = {
        "exact": model.MatchKind.EXACT,
        "prefix": model.MatchKind.PREFIX,
        "suffix": model.MatchKind.SUFFIX,
        "contains": model.MatchKind.CONTAINS,
    }
    if kind not in kinds:
        raise ConversionError(f"{at}: {kind} is not supported")
    value: str = getattr(message, kind)
    return kinds[kind], value.lower() if message.ignore_case else value, message.ignore_case, None


def _regex(message: regex_pb2.RegexMatcher, at: str) -> Pattern:
    try:
        return Pattern(message.regex)
    except RegexError as error:
        raise ConversionError(f"{at}: {message.regex!r}: {error}") from None


def _rewrite(pattern: Pattern, substitution: str, at: str) -> Rewrite:
    try:
        return Rewrite.of(pattern, _visible(substitution, at))
    except RegexError as error:
        raise ConversionError(f"{at}: {substitution!r}: {error}") from None


def _visible(text: str, at: str) -> str:
    """What becomes part of a start line, a Host or a Location: a space or a line's end would begin something else."""
    if re.search(r"[^\x21-\x7e]", text):
        raise ConversionError(f"{at}: {text!r}: only visible ASCII characters are allowed")
    return text


def _retry(message: route_components_pb2.RetryPolicy, at: str) -> model.RetryPolicy | None:
    codes = set(message.retriable_status_codes)
    retry_on: set[str] = set()
    for name in (part.strip() for part in message.retry_on.split(",") if part.strip()):
        if name.isdigit():
            codes.add(int(name))
            retry_on.add("retriable-status-codes")
        elif name in RETRY_ON:
            retry_on.add(name)
        elif name not in _RETRY_ON_IGNORED:
            raise ConversionError(f"{at}.retry_on: {name!r} is not known")
    base, longest = 0.025, 0.0
    if message.HasField("retry_back_off"):
        base = seconds(message.retry_back_off.base_interval)
        if base <= 0:
            raise ConversionError(f"{at}.retry_back_off.base_interval: must be more than 0")
        longest = seconds(message.retry_back_off.max_interval)
        if longest and longest < base:
            raise ConversionError(f"{at}.retry_back_off.max_interval: less than base_interval")
    if not retry_on:
        return None
    return model.RetryPolicy(
        retry_on=frozenset(retry_on),
        num_retries=message.num_retries.value if message.HasField("num_retries") else 1,
        per_try_timeout=seconds(message.per_try_timeout),
        status_codes=frozenset(codes),
        base_interval=base,
        max_interval=longest or base * 10,
        avoid_previous_hosts=any(p.name == _PREVIOUS_HOSTS for p in message.retry_host_predicate),
        host_selection_attempts=message.host_selection_retry_max_attempts or 1,
    )


def _redirect(message: route_components_pb2.RedirectAction, at: str) -> model.Redirect:
    path = message.WhichOneof("path_rewrite_specifier")
    if path == "regex_rewrite":
        raise ConversionError(f"{at}.regex_rewrite: not supported")
    scheme = message.scheme_redirect
    if message.https_redirect:
        scheme = "https"
    for name in ("scheme_redirect", "host_redirect", "path_redirect", "prefix_rewrite"):
        _visible(getattr(message, name), f"{at}.{name}")
    if message.response_code not in _REDIRECTS:
        raise ConversionError(f"{at}.response_code: {message.response_code} is not known")
    return model.Redirect(
        status=_REDIRECTS[message.response_code],
        scheme=scheme,
        host=message.host_redirect,
        port=message.port_redirect,
        path=message.path_redirect,
        prefix=message.prefix_rewrite if path == "prefix_rewrite" else None,
        strip_query=message.strip_query,
    )


def _mutation(add: Iterable[base_pb2.HeaderValueOption], remove: Iterable[str]) -> model.HeaderMutation:
    values: list[model.HeaderValue] = []
    for option in add:
        name = option.header.key.lower()
        text = option.header.raw_value or option.header.value.encode("latin-1", "replace")
        if re.search(rb"%[A-Z_]+(?:\(|%)", text):
            raise ConversionError(f"headers_to_add: {name}: command operators are not supported")
        text = text.replace(b"%%", b"%")
        if not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9a-z]+", name) or re.search(rb"[\r\n\x00]", text):
            raise ConversionError(f"headers_to_add: {name!r}: invalid header")
        if name in _FRAMING:
            raise ConversionError(f"headers_to_add: {name}: may not be set")
        actions = base_pb2.HeaderValueOption
        append = option.append_action == actions.APPEND_IF_EXISTS_OR_ADD
        if option.HasField("append"):
            append = option.append.value
        values.append(
            model.HeaderValue(name.encode(), text, append, option.append_action == actions.ADD_IF_ABSENT)
        )
    removed = tuple(name.lower() for name in remove)
    for name in removed:
        if name in _FRAMING:
            raise ConversionError(f"headers_to_remove: {name}: may not be removed")
    return model.HeaderMutation(tuple(values), tuple(name.encode() for name in removed))


def _join(first: model.HeaderMutation, then: model.HeaderMutation) -> model.HeaderMutation:
    if not then:
        return first
    return model.HeaderMutation(first.add + then.add, first.remove + then.remove)
