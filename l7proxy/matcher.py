"""Which route a request takes: Envoy's semantics of domains, route order and matchers, without side effects.

Owns matching only. Randomness is passed in (0 <= random < 2**32), so that a choice can be repeated.
"""

from __future__ import annotations

from l7proxy.http1.head import RequestHead
from l7proxy.model import (
    HeaderMatcher,
    MatchKind,
    PathKind,
    QueryMatcher,
    Redirect,
    Route,
    RouteMatch,
    RouteTable,
    TlsRequirement,
    VirtualHost,
    WeightedCluster,
)
from l7proxy.regex import Pattern


def virtual_host(table: RouteTable, authority: str) -> VirtualHost | None:
    """By Envoy's order: exact, longest suffix wildcard, longest prefix wildcard, ``*``."""
    if not table.exact and not table.suffixes and not table.prefixes:
        return table.default
    host = authority.lower()
    found = table.exact.get(host)
    if found is not None:
        return found
    for suffix, candidate in table.suffixes:
        if len(host) > len(suffix) and host.endswith(suffix):
            return candidate
    for prefix, candidate in table.prefixes:
        if len(host) > len(prefix) and host.startswith(prefix):
            return candidate
    return table.default


def find_route(table: RouteTable, head: RequestHead, random: int) -> Route | None:
    """The first route of the request's virtual host that matches."""
    host = virtual_host(table, head.host)
    return find_in(host, head, random) if host is not None else None


_TO_HTTPS = Route("require_tls", RouteMatch(PathKind.PREFIX, "/"), redirect=Redirect(scheme="https"))


def find_in(
    host: VirtualHost, head: RequestHead, random: int, *, secure: bool = False, internal: bool = True
) -> Route | None:
    """The first route that matches, after ``require_tls``.

    ``secure``: the client's connection is TLS; ``internal``: it comes from inside the mesh. Here it is always plain and
    from inside: what TLS there is, is the mesh's.
    """
    required = host.require_tls
    if (
        required is not TlsRequirement.NONE
        and not secure
        and (required is TlsRequirement.ALL or not internal)
    ):
        return _TO_HTTPS
    for route in host.routes:
        if matches(route.match, head, random):
            return route
    return None


def matches(match: RouteMatch, head: RequestHead, random: int) -> bool:
    kind = match.path_kind
    path = head.path
    if (head.method == b"CONNECT") != (kind is PathKind.CONNECT):
        # A CONNECT has no path: Envoy matches it by connect_matcher only, and that matches nothing else.
        return False
    if kind is PathKind.PREFIX:
        if not (path.lower() if match.ignore_case else path).startswith(match.path):
            return False
    elif kind is not PathKind.CONNECT:
        bare = path.partition("?")[0]
        if match.ignore_case:
            bare = bare.lower()
        if kind is PathKind.EXACT:
            if bare != match.path:
                return False
        elif kind is PathKind.SEGMENT_PREFIX:
            if bare != match.path and not bare.startswith(match.path + "/"):
                return False
        elif match.regex is None or not match.regex.matches(bare):
            return False
    if match.fraction < 1_000_000 and random % 1_000_000 >= match.fraction:
        return False
    for header in match.headers:
        if not header_matches(header, head):
            return False
    if match.grpc and not _is_grpc(head):
        return False
    return not match.query or _query_matches(match.query, path)


def header_value(head: RequestHead, name: bytes) -> str | None:
    """A header's value (repeated ones joined by a comma) or a pseudo header's; None if there is none."""
    value = head.values.get(name)
    if name[:1] == b":":
        if name == b":path":
            return head.path
        if name == b":method":
            return head.method_text
        if name == b":authority":
            return head.host
        if name == b":scheme":
            return "http"
        return None
    if name == b"host":
        return head.host
    return None if value is None else value.decode("latin-1")


def header_matches(matcher: HeaderMatcher, head: RequestHead) -> bool:
    value = header_value(head, matcher.name)
    kind = matcher.kind
    if value is None:
        if not matcher.missing_as_empty:
            # An absent header never matches, but an inverted presence matches its absence. Envoy: an inverted value match
            # does match an absent header.
            return matcher.invert
        value = ""
    if kind is MatchKind.PRESENT:
        result = True
    elif kind is MatchKind.RANGE:
        try:
            result = "_" not in value and matcher.range[0] <= int(value) < matcher.range[1]
        except ValueError:
            result = False
    else:
        result = _text_matches(kind, matcher.value, matcher.ignore_case, matcher.regex, value)
    return result != matcher.invert


def _text_matches(kind: MatchKind, wanted: str, ignore_case: bool, regex: Pattern | None, value: str) -> bool:
    if ignore_case:
        value = value.lower()
    if kind is MatchKind.EXACT:
        return value == wanted
    if kind is MatchKind.PREFIX:
        return value.startswith(wanted)
    if kind is MatchKind.SUFFIX:
        return value.endswith(wanted)
    if kind is MatchKind.CONTAINS:
        return wanted in value
    return regex is not None and regex.matches(value)


def _query_matches(matchers: tuple[QueryMatcher, ...], path: str) -> bool:
    # As Envoy: the first of a name, and nothing decoded.
    parameters: dict[str, str] = {}
    for pair in path.partition("?")[2].split("&"):
        name, _, value = pair.partition("=")
        parameters.setdefault(name, value)
    for matcher in matchers:
        found = parameters.get(matcher.name)
        if found is None:
            return False
        if matcher.kind is not MatchKind.PRESENT and not _text_matches(
            matcher.kind, matcher.value, matcher.ignore_case, matcher.regex, found
        ):
            return False
    return True


def _is_grpc(head: RequestHead) -> bool:
    kind = head.values.get(b"content-type", b"")
    return kind == b"application/grpc" or kind.startswith(b"application/grpc+")


def choose_cluster(route: Route, head: RequestHead, random: int) -> WeightedCluster | None:
    """The cluster for this request: weighted ones by ``random`` modulo the total weight."""
    clusters = route.clusters
    if len(clusters) == 1:
        return clusters[0]
    if route.cluster_header:
        name = header_value(head, route.cluster_header)
        return WeightedCluster(name, 1) if name else None
    left = random % route.total_weight
    for choice in clusters:
        if left < choice.weight:
            return choice
        left -= choice.weight
    return None


def rewritten_path(route: Route, path: str) -> str:
    """The path that goes upstream."""
    if route.prefix_rewrite:
        if route.match.path_kind is PathKind.REGEX:
            return "".join((route.prefix_rewrite, *path.partition("?")[1:]))
        return route.prefix_rewrite + path[len(route.match.path) :]
    if route.regex_rewrite is not None:
        bare, mark, query = path.partition("?")
        return route.regex_rewrite.apply(bare) + mark + query
    return path


def redirect_location(redirect: Redirect, route: Route, head: RequestHead, scheme: str = "http") -> str:
    """The Location of a redirect (Envoy's newUri); ``scheme`` is the request's own."""
    scheme = redirect.scheme or scheme
    authority = redirect.host or head.host
    if redirect.port:
        if not redirect.host:
            authority = authority if authority.endswith("]") else authority.rpartition(":")[0] or authority
        authority += f":{redirect.port}"
    elif not redirect.host and redirect.scheme == "https" and authority.endswith(":80"):
        authority = authority[: -len(":80")]
    path, mark, query = head.path.partition("?")
    rest = "" if redirect.strip_query else mark + query
    if redirect.path:
        path = redirect.path
        rest = "" if "?" in path else rest
    elif redirect.prefix is not None:
        path = redirect.prefix + path[len(route.match.path) :]
    return f"{scheme}://{authority}{path}{rest}"
