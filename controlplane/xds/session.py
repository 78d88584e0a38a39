"""What one ADS client has subscribed to, has been sent and has in force (state of the world; no sockets, no clock).

Make before break, on one stream: clusters, their endpoints, the listener, routes. The latter two wait until the client
has taken the former two. A cluster that is gone stays until routes that may still use it have been replaced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from envoy.service.discovery.v3 import discovery_pb2

from controlplane.xds.resources import Packed, Resources
from controlplane.xds.types import Type

#: Seconds that listener and routes wait for the client to ask for the endpoints of new clusters. Envoy asks at once; a client
#: that asks later, or never, shall not wait for its routes for ever.
ENDPOINTS_PATIENCE = 0.5


@dataclass
class Subscription:
    """One type of one client."""

    names: frozenset[str] | None = None  #: None: all
    sent: dict[str, Packed] = field(default_factory=dict)
    nonce: str = ""
    version: str = ""
    acked: str = ""
    error: str = ""
    waiting: bool = False
    #: The client has asked, and not been answered at all yet.
    fresh: bool = True


@dataclass(frozen=True, slots=True)
class Answered:
    """A client's answer to a response; ``error`` is empty for an ACK."""

    kind: Type
    version: str
    error: str


class AdsSession:
    """Give it requests with :meth:`request`, then send what :meth:`responses` returns."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self.subscriptions: dict[Type, Subscription] = {}
        self._count = 0
        self._clusters_sent_at: float | None = None

    def request(self, request: discovery_pb2.DiscoveryRequest) -> Answered | None:
        """Take a request; what it answers, if it answers the last response of its type. Unknown types are ignored."""
        try:
            kind = Type(request.type_url)
        except ValueError:
            return None
        subscription = self.subscriptions.get(kind)
        if subscription is None:
            subscription = self.subscriptions[kind] = Subscription()
        elif request.response_nonce != subscription.nonce:
            return None  # an answer to an older response: the client will answer the last one too
        answered = None
        if subscription.waiting and request.response_nonce:
            subscription.waiting = False
            subscription.error = request.error_detail.message if request.HasField("error_detail") else ""
            if not subscription.error:
                subscription.acked = subscription.version
            answered = Answered(kind, subscription.version, subscription.error)
        names = frozenset(request.resource_names)
        if kind.whole and (not names or "*" in names):
            subscription.names = None
        else:
            subscription.names = names
            for name in subscription.sent.keys() - names:
                # Given up and later asked for again, it has to be sent again.
                del subscription.sent[name]
        return answered

    def responses(self, resources: Resources, now: float) -> list[discovery_pb2.DiscoveryResponse]:
        """What to send now."""
        result = []
        for kind in Type:
            subscription = self.subscriptions.get(kind)
            if subscription is None:
                continue
            if kind in (Type.LISTENER, Type.ROUTES) and self._clusters_pending(now):
                break
            if not subscription.waiting:
                wanted = self._wanted(kind, subscription, resources)
                changes = self._changes(kind, subscription, wanted)
                if changes is not None:
                    result.append(self._response(kind, subscription, wanted, changes, now))
        return result

    def wait(self, now: float) -> float | None:
        """Seconds until :meth:`responses` has to be asked again even if nothing happens; None: no need to."""
        if self._clusters_sent_at is None or not self._endpoints_pending(now):
            return None
        return self._clusters_sent_at + ENDPOINTS_PATIENCE - now

    def settled(self, resources: Resources) -> bool:
        """True if the client has answered for everything that it asked for."""
        return all(
            not s.waiting and self._changes(kind, s, self._wanted(kind, s, resources)) is None
            for kind, s in self.subscriptions.items()
        )

    def _wanted(self, kind: Type, subscription: Subscription, resources: Resources) -> Mapping[str, Packed]:
        """What the client should have of a type."""
        there = resources.of(kind, self._socket)
        if kind in (Type.CLUSTER, Type.ENDPOINTS) and not self._routed(resources):
            there = {**subscription.sent, **there}
        if subscription.names is None:
            return there
        return {name: there[name] for name in sorted(subscription.names) if name in there}

    def _routed(self, resources: Resources) -> bool:
        """True if listener and routes are those of ``resources``, and the client has taken them."""
        for kind in (Type.LISTENER, Type.ROUTES):
            subscription = self.subscriptions.get(kind)
            if subscription is None:
                continue
            wanted = self._wanted(kind, subscription, resources)
            if (
                subscription.waiting
                or subscription.error
                or self._changes(kind, subscription, wanted) is not None
            ):
                return False
        return True

    def _changes(
        self, kind: Type, subscription: Subscription, wanted: Mapping[str, Packed]
    ) -> list[str] | None:
        """Names to send, or None if there is nothing to say."""
        sent = subscription.sent
        changed = [n for n, p in wanted.items() if n not in sent or sent[n].digest != p.digest]
        if subscription.fresh and (kind.whole or changed):
            return list(wanted)
        if kind.whole:
            return list(wanted) if changed or sent.keys() - wanted.keys() else None
        return changed or None

    def _response(
        self,
        kind: Type,
        subscription: Subscription,
        wanted: Mapping[str, Packed],
        names: list[str],
        now: float,
    ) -> discovery_pb2.DiscoveryResponse:
        if kind is Type.CLUSTER:
            self._clusters_sent_at = now
            endpoints = self.subscriptions.get(Type.ENDPOINTS)
            for name in names:
                # Envoy warms a cluster that has changed, and waits for its endpoints again.
                if endpoints and subscription.sent.get(name, ("", ""))[1] != wanted[name].digest:
                    endpoints.sent.pop(name, None)
            subscription.sent = dict(wanted)
        elif kind.whole:
            subscription.sent = dict(wanted)
        else:
            subscription.sent.update({n: wanted[n] for n in names})
        self._count += 1
        subscription.nonce = str(self._count)
        subscription.version = _version(wanted)
        subscription.waiting = True
        subscription.fresh = False
        return discovery_pb2.DiscoveryResponse(
            version_info=subscription.version,
            type_url=kind.value,
            nonce=subscription.nonce,
            resources=[wanted[n].any for n in sorted(names)],
        )

    def _missing_endpoints(self) -> bool:
        """True if the client has clusters of which it has not asked for the endpoints yet."""
        clusters = self.subscriptions.get(Type.CLUSTER)
        endpoints = self.subscriptions.get(Type.ENDPOINTS)
        if clusters is None or clusters.error or not clusters.sent:
            return False
        return endpoints is None or endpoints.names is None or not clusters.sent.keys() <= endpoints.names

    def _endpoints_pending(self, now: float) -> bool:
        started = self._clusters_sent_at
        return started is not None and self._missing_endpoints() and now < started + ENDPOINTS_PATIENCE

    def _clusters_pending(self, now: float) -> bool:
        """True while the client has clusters or endpoints to take.

        Envoy acknowledges clusters when they are warm, which takes their endpoints: so these never wait for that.
        """
        both = (self.subscriptions.get(Type.CLUSTER), self.subscriptions.get(Type.ENDPOINTS))
        return any(s is not None and s.waiting for s in both) or self._endpoints_pending(now)


def _version(resources: Mapping[str, Packed]) -> str:
    """Follows from content alone: the same resources have the same version on every controller."""
    text = "\n".join(f"{name} {packed.digest}" for name, packed in sorted(resources.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
