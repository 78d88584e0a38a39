"""L7 routing as the controller means it, before it becomes Envoy's types: frozen, comparable, with canonical bytes.

Durations are milliseconds. Names of clusters and route tables are Istio's, so that tools which parse them keep working.
"""

from __future__ import annotations

import enum

import msgspec


class MatchKind(enum.Enum):
    EXACT = "exact"
    PREFIX = "prefix"
    REGEX = "regex"  #: RE2, the whole value
    PRESENT = "present"


class StringMatch(msgspec.Struct, frozen=True):
    kind: MatchKind
    value: str = ""
    ignore_case: bool = False


class HeaderMatch(msgspec.Struct, frozen=True):
    """``name`` in lower case; pseudo headers are ``:method``, ``:authority``, ``:scheme``."""

    name: str
    match: StringMatch
    invert: bool = False


class QueryMatch(msgspec.Struct, frozen=True):
    name: str
    match: StringMatch


class RouteMatch(msgspec.Struct, frozen=True):
    """All of it has to match; no path means every path."""

    path: StringMatch = StringMatch(MatchKind.PREFIX, "/")
    headers: tuple[HeaderMatch, ...] = ()
    query: tuple[QueryMatch, ...] = ()


class RetryPolicy(msgspec.Struct, frozen=True):
    """``attempts`` are retries after the first try; conditions are Envoy's ``x-envoy-retry-on`` terms."""

    attempts: int
    conditions: tuple[str, ...]
    status_codes: tuple[int, ...] = ()
    per_try_timeout: int | None = None
    backoff: int | None = None
    previous_hosts: bool = True  #: a retry looks for a host that was not tried


class HeaderChanges(msgspec.Struct, frozen=True):
    """Changes to requests and responses; pairs are (name, value)."""

    request_set: tuple[tuple[str, str], ...] = ()
    request_add: tuple[tuple[str, str], ...] = ()
    request_remove: tuple[str, ...] = ()
    response_set: tuple[tuple[str, str], ...] = ()
    response_add: tuple[tuple[str, str], ...] = ()
    response_remove: tuple[str, ...] = ()


class Weighted(msgspec.Struct, frozen=True):
    cluster: str
    weight: int
    headers: HeaderChanges | None = None


class Forward(msgspec.Struct, frozen=True, tag="forward"):
    """To one of the clusters, drawn by weight for every request. ``timeout`` 0 is none."""

    clusters: tuple[Weighted, ...]
    timeout: int = 0
    retry: RetryPolicy | None = None
    rewrite_prefix: str | None = None
    rewrite_regex: tuple[str, str] | None = None  #: RE2 pattern, substitution
    rewrite_authority: str | None = None


class Redirect(msgspec.Struct, frozen=True, tag="redirect"):
    code: int = 301
    path: str | None = None
    prefix: str | None = None
    authority: str | None = None
    scheme: str | None = None
    port: int | None = None


class Respond(msgspec.Struct, frozen=True, tag="respond"):
    status: int
    body: bytes = b""


class Route(msgspec.Struct, frozen=True):
    match: RouteMatch
    action: Forward | Redirect | Respond
    name: str = ""
    headers: HeaderChanges | None = None


class Balancing(enum.Enum):
    LEAST_REQUEST = "LEAST_REQUEST"
    ROUND_ROBIN = "ROUND_ROBIN"
    RANDOM = "RANDOM"


class ClusterEndpoint(msgspec.Struct, frozen=True):
    """A ready pod behind a cluster, with what metrics and the local hand-over need to know of it."""

    address: str
    port: int
    uid: str
    namespace: str
    name: str
    node: str
    identity: str
    service_account: str
    enrolled: bool
    workload: str
    app: str
    version: str


class Cluster(msgspec.Struct, frozen=True):
    """Endpoints of one service port, or of one subset of them. ``name`` is ``outbound|PORT|SUBSET|HOST``."""

    name: str
    host: str
    service: str
    namespace: str
    port: int
    subset: str = ""
    balancing: Balancing = Balancing.LEAST_REQUEST
    http2: bool = False  #: the application speaks HTTP/2 in clear text (port named http2 or grpc)
    endpoints: tuple[ClusterEndpoint, ...] = ()


class RouteTable(msgspec.Struct, frozen=True):
    """What happens to requests to one port of one service, whatever their Host. ``name`` is ``HOST:PORT``."""

    name: str
    host: str
    addresses: tuple[str, ...]  #: the service's cluster addresses
    port: int
    routes: tuple[Route, ...]


def cluster_name(host: str, port: int, subset: str = "") -> str:
    """Istio's name of an outbound cluster."""
    return f"outbound|{port}|{subset}|{host}"
