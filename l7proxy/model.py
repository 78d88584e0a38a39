"""The proxy's configuration: one frozen, checked snapshot of what the controller served.

Owns data only. Conversion from xDS is in :mod:`l7proxy.convert`; what matches and what is chosen in :mod:`l7proxy.matcher`
and :mod:`l7proxy.balancer`. Durations are seconds; 0 means none.
"""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from l7proxy.regex import Pattern, Rewrite


class LbPolicy(enum.Enum):
    ROUND_ROBIN = "ROUND_ROBIN"
    RANDOM = "RANDOM"
    LEAST_REQUEST = "LEAST_REQUEST"


def host_port(address: str, port: int) -> str:
    """As URLs and the access log have it (RFC 3986, section 3.2.2)."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address of a cluster, and the workload behind it (empty strings where the controller did not say)."""

    address: str
    port: int
    uid: str = ""
    name: str = ""
    namespace: str = ""
    workload: str = "unknown"
    service_account: str = ""
    identity: str = ""
    node: str = ""
    enrolled: bool = False
    app: str = "unknown"
    version: str = "unknown"
    weight: int = 1
    #: what connections are pooled by: the same address of another pod is another endpoint
    key: str = field(init=False, compare=False)
    #: ``ADDRESS:PORT``, as the access log prints it
    host: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", host_port(self.address, self.port))
        object.__setattr__(
            self, "key", f"{self.uid}/{self.node}/{int(self.enrolled)}/{self.address}:{self.port}"
        )


@dataclass(frozen=True, slots=True)
class Cluster:
    """``service`` is the host part of ``outbound|PORT|SUBSET|HOST`` (the whole name where it has another form)."""

    name: str
    service: str
    service_name: str
    service_namespace: str
    eds_name: str
    lb_policy: LbPolicy = LbPolicy.ROUND_ROBIN
    connect_timeout: float = 5.0
    max_connections: int = 1024
    max_pending_requests: int = 1024


class MatchKind(enum.Enum):
    EXACT = "exact"
    PREFIX = "prefix"
    SUFFIX = "suffix"
    CONTAINS = "contains"
    REGEX = "regex"
    PRESENT = "present"
    RANGE = "range"


@dataclass(frozen=True, slots=True)
class HeaderMatcher:
    """Envoy's HeaderMatcher. ``name`` is lower case; pseudo headers (``:path``...) are allowed."""

    name: bytes
    kind: MatchKind
    value: str = ""
    ignore_case: bool = False
    invert: bool = False
    missing_as_empty: bool = False
    regex: Pattern | None = None
    range: tuple[int, int] = (0, 0)  #: half open


@dataclass(frozen=True, slots=True)
class QueryMatcher:
    name: str
    kind: MatchKind
    value: str = ""
    ignore_case: bool = False
    regex: Pattern | None = None


class PathKind(enum.Enum):
    PREFIX = "prefix"
    EXACT = "path"
    REGEX = "safe_regex"
    SEGMENT_PREFIX = "path_separated_prefix"
    CONNECT = "connect_matcher"


@dataclass(frozen=True, slots=True)
class RouteMatch:
    path_kind: PathKind
    path: str = ""
    regex: Pattern | None = None
    ignore_case: bool = False
    headers: tuple[HeaderMatcher, ...] = ()
    query: tuple[QueryMatcher, ...] = ()
    grpc: bool = False
    #: share of requests that match, of a million
    fraction: int = 1_000_000


@dataclass(frozen=True, slots=True)
class HeaderValue:
    """A header to add. ``append`` False replaces what is there."""

    name: bytes
    value: bytes
    append: bool = True
    only_if_absent: bool = False


@dataclass(frozen=True, slots=True)
class HeaderMutation:
    add: tuple[HeaderValue, ...] = ()
    remove: tuple[bytes, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.add or self.remove)


NO_MUTATION = HeaderMutation()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """``retry_on`` are Envoy's names, validated."""

    retry_on: frozenset[str]
    num_retries: int = 1
    per_try_timeout: float = 0.0
    status_codes: frozenset[int] = frozenset()
    base_interval: float = 0.025
    max_interval: float = 0.25
    avoid_previous_hosts: bool = False
    host_selection_attempts: int = 1


@dataclass(frozen=True, slots=True)
class WeightedCluster:
    name: str
    weight: int
    request_headers: HeaderMutation = NO_MUTATION
    response_headers: HeaderMutation = NO_MUTATION


@dataclass(frozen=True, slots=True)
class Redirect:
    status: int = 301
    scheme: str = ""
    host: str = ""
    port: int = 0
    path: str = ""
    prefix: str | None = None
    strip_query: bool = False


@dataclass(frozen=True, slots=True)
class DirectResponse:
    status: int
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Route:
    """One entry of a virtual host. Exactly one of ``clusters``, ``redirect`` and ``direct`` says what happens.

    ``cluster_header`` names a header whose value is the cluster.
    """

    name: str
    match: RouteMatch
    clusters: tuple[WeightedCluster, ...] = ()
    total_weight: int = 0
    cluster_header: bytes = b""
    cluster_not_found: int = 503
    timeout: float = 15.0
    retry: RetryPolicy | None = None
    prefix_rewrite: str = ""
    regex_rewrite: Rewrite | None = None
    host_rewrite: str = ""
    auto_host_rewrite: bool = False
    redirect: Redirect | None = None
    direct: DirectResponse | None = None
    request_headers: HeaderMutation = NO_MUTATION
    response_headers: HeaderMutation = NO_MUTATION
    attempt_count: bool = False
    #: what the head of a request that follows this route depends on; see l7proxy.headers
    plain: bool = True


class TlsRequirement(enum.Enum):
    NONE = "NONE"
    EXTERNAL_ONLY = "EXTERNAL_ONLY"
    ALL = "ALL"


@dataclass(frozen=True, slots=True)
class VirtualHost:
    name: str
    domains: tuple[str, ...]
    routes: tuple[Route, ...]
    require_tls: TlsRequirement = TlsRequirement.NONE


@dataclass(frozen=True, slots=True)
class RouteTable:
    """A RouteConfiguration with its virtual hosts indexed by domain (all in lower case)."""

    name: str
    virtual_hosts: tuple[VirtualHost, ...]
    exact: Mapping[str, VirtualHost]
    #: ``*.example.com`` without its star, longest first
    suffixes: tuple[tuple[str, VirtualHost], ...] = ()
    #: ``www.*`` without its star, longest first
    prefixes: tuple[tuple[str, VirtualHost], ...] = ()
    default: VirtualHost | None = None
    #: every cluster that a route names
    clusters: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class HttpManager:
    """What an HttpConnectionManager says. ``upgrades`` are protocol names in lower case."""

    route_name: str
    inline: RouteTable | None = None
    use_remote_address: bool = False
    skip_xff_append: bool = False
    generate_request_id: bool = True
    normalize_path: bool = False
    merge_slashes: bool = False
    stream_idle_timeout: float = 300.0
    request_headers_timeout: float = 0.0
    idle_timeout: float = 3600.0
    upgrades: frozenset[str] = frozenset({"websocket"})


@dataclass(frozen=True, slots=True)
class FilterChain:
    prefix: ipaddress.IPv4Network | ipaddress.IPv6Network
    port: int
    manager: HttpManager
    name: str = ""


@dataclass(frozen=True, slots=True)
class Listener:
    name: str
    chains: tuple[FilterChain, ...]


@dataclass(frozen=True, slots=True)
class Destination:
    """What serves one original destination: how, and by which routes (None: the controller has not sent them yet)."""

    manager: HttpManager
    routes: RouteTable | None


@dataclass(frozen=True, slots=True, eq=False)
class Config:
    """Everything a request needs. Build it with :func:`build_config`."""

    version: str = ""
    clusters: Mapping[str, Cluster] = field(default_factory=dict)
    endpoints: Mapping[str, tuple[Endpoint, ...]] = field(default_factory=dict)  #: by cluster name
    hosts: Mapping[tuple[str, int], Destination] = field(default_factory=dict)  #: chains for one address
    networks: tuple[tuple[FilterChain, Destination], ...] = ()  #: the others, longest prefix first

    def destination(self, address: str, port: int) -> Destination | None:
        """Who serves what was dialled, by the most specific filter chain; None: nobody."""
        found = self.hosts.get((address, port))
        if found is not None:
            return found
        ip = ipaddress.ip_address(address)
        for chain, destination in self.networks:
            if chain.port in (0, port) and ip in chain.prefix:
                return destination
        return None


EMPTY = Config()


def build_config(
    version: str,
    listeners: Mapping[str, Listener],
    routes: Mapping[str, RouteTable],
    clusters: Mapping[str, Cluster],
    assignments: Mapping[str, tuple[Endpoint, ...]],
) -> Config:
    """Join converted resources. ``assignments`` are by EDS name; a cluster without one is not served (it is warming)."""
    hosts: dict[tuple[str, int], Destination] = {}
    networks: list[tuple[FilterChain, Destination]] = []
    for listener in listeners.values():
        for chain in listener.chains:
            manager = chain.manager
            destination = Destination(manager, manager.inline or routes.get(manager.route_name))
            if chain.prefix.prefixlen == chain.prefix.max_prefixlen and chain.port:
                hosts[(str(chain.prefix.network_address), chain.port)] = destination
            else:
                networks.append((chain, destination))
    networks.sort(key=lambda item: (-(item[0].port != 0), -item[0].prefix.prefixlen))
    warm = {name: cluster for name, cluster in clusters.items() if cluster.eds_name in assignments}
    return Config(
        version=version,
        clusters=MappingProxyType(warm),
        endpoints=MappingProxyType({name: assignments[cluster.eds_name] for name, cluster in warm.items()}),
        hosts=MappingProxyType(hosts),
        networks=tuple(networks),
    )
