"""What one client of incremental ADS has subscribed to, has been sent and has in force (no sockets, no clock).

Only what has changed is sent, and what is sent to many is encoded once. Make before break, as in :mod:`controlplane.xds.session`:
clusters and endpoints that came or changed, then listeners and routes, and when the client has taken those, the removal of
clusters and endpoints that are gone.

Beyond the protocol: every type can be subscribed to as a whole, by no name or ``*``, also endpoints and routes; and to such a
client each filter chain comes as a listener of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from envoy.service.discovery.v3 import discovery_pb2

from controlplane.xds.resources import Packed, Resources
from controlplane.xds.session import Answered
from controlplane.xds.types import Type

_LATER = (Type.LISTENER, Type.ROUTES)


@dataclass(frozen=True, slots=True)
class Delta:
    """From one set of resources of a type to another."""

    upserts: tuple[str, ...]
    removes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A response that may be sent to many."""

    kind: Type
    version: str
    nonce: str
    data: bytes
    resources: int


class Deltas:
    """Differences and encoded responses, shared by all sessions. Those to the newest resources are remembered."""

    def __init__(self) -> None:
        self._nonces = itertools.count(1)
        self._target = ""
        self._found: dict[tuple[int, int], tuple[Delta, object, object]] = {}
        self._encoded: dict[tuple[Type, int, tuple[str, ...], tuple[str, ...]], tuple[Encoded, object]] = {}

    def aim(self, version: str) -> None:
        """Say what is the newest: what was remembered for another one is forgotten."""
        if version != self._target:
            self._target = version
            self._found.clear()
            self._encoded.clear()

    def between(self, old: Mapping[str, Packed], new: Mapping[str, Packed]) -> Delta:
        key = (id(old), id(new))
        if key not in self._found:
            upserts = tuple(
                n
                for n, p in new.items()
                if (o := old.get(n)) is not p and (o is None or o.digest != p.digest)
            )
            removes = tuple(n for n in old if n not in new)
            # The two are kept with it: an id is one object's only while it lives.
            self._found[key] = Delta(upserts, removes), old, new
        return self._found[key][0]

    def encode(
        self, kind: Type, there: Mapping[str, Packed], upserts: tuple[str, ...], removes: tuple[str, ...]
    ) -> Encoded:
        key = (kind, id(there), upserts, removes)
        if key not in self._encoded:
            nonce = f"{next(self._nonces)}"
            response = discovery_pb2.DeltaDiscoveryResponse(
                system_version_info=self._target[:16],
                type_url=kind.value,
                nonce=nonce,
                resources=[
                    discovery_pb2.Resource(name=n, version=there[n].digest[:16], resource=there[n].any)
                    for n in upserts
                ],
                removed_resources=removes,
            )
            made = Encoded(kind, self._target[:16], nonce, response.SerializeToString(), len(upserts))
            self._encoded[key] = made, there
        return self._encoded[key][0]


@dataclass
class _Subscription:
    """One type of one client."""

    whole: bool
    names: set[str] = field(default_factory=set)  #: unless ``whole``
    has: dict[str, str] = field(
        default_factory=dict
    )  #: versions that it brought along, until the first response
    sent: Mapping[str, Packed] | None = None  #: what it has been brought to; None: nothing yet
    stale: frozenset[str] = frozenset()  #: what it has besides, and has to be told to remove
    fresh: set[str] = field(default_factory=set)  #: names asked for since
    nonce: str = ""
    version: str = ""
    error: str = ""
    waiting: bool = False


class DeltaSession:
    """Give it requests with :meth:`request`, then send what :meth:`responses` returns."""

    def __init__(self, socket: str, deltas: Deltas) -> None:
        self._socket = socket
        self._deltas = deltas
        self._subscriptions: dict[Type, _Subscription] = {}

    def request(self, request: discovery_pb2.DeltaDiscoveryRequest) -> Answered | None:
        """Take a request; what it answers, if it answers the last response of its type. Unknown types are ignored."""
        try:
            kind = Type(request.type_url)
        except ValueError:
            return None
        asked = list(request.resource_names_subscribe)
        subscription = self._subscriptions.get(kind)
        if subscription is None:
            whole = not asked or "*" in asked
            subscription = self._subscriptions[kind] = _Subscription(whole)
            subscription.has = dict(request.initial_resource_versions)
        elif "*" in asked:
            subscription.whole = True
        if not subscription.whole:
            subscription.names |= set(asked)
            subscription.fresh |= set(asked)
            for name in request.resource_names_unsubscribe:
                subscription.names.discard(name)
                subscription.fresh.discard(name)
            if subscription.sent is not None and request.resource_names_unsubscribe:
                # Given up is not gone: the client has forgotten it by itself.
                kept = subscription.sent.items()
                subscription.sent = {n: p for n, p in kept if n in subscription.names}
        if not (subscription.waiting and request.response_nonce == subscription.nonce):
            return None
        subscription.waiting = False
        subscription.error = request.error_detail.message if request.HasField("error_detail") else ""
        return Answered(kind, subscription.version, subscription.error)

    def responses(self, resources: Resources) -> list[Encoded]:
        """What to send now."""
        self._deltas.aim(resources.version)
        result = []
        for kind in Type:
            subscription = self._subscriptions.get(kind)
            if subscription is None:
                continue
            if kind in _LATER and any(s.waiting for k, s in self._subscriptions.items() if k not in _LATER):
                break
            if not subscription.waiting:
                made = self._response(kind, subscription, resources)
                if made:
                    subscription.nonce, subscription.version = made.nonce, made.version
                    subscription.waiting = True
                    result.append(made)
        return result

    def settled(self, resources: Resources) -> bool:
        """True if the client has answered for everything that it asked for."""
        return all(
            not s.waiting and not s.stale and self._current(kind, s, resources)
            for kind, s in self._subscriptions.items()
        )

    def _current(self, kind: Type, subscription: _Subscription, resources: Resources) -> bool:
        there = self._there(kind, subscription, resources)
        return subscription.sent is there or (
            subscription.sent is not None
            and not subscription.fresh
            and self._deltas.between(subscription.sent, there) == Delta((), ())
        )

    def _there(self, kind: Type, subscription: _Subscription, resources: Resources) -> Mapping[str, Packed]:
        there = resources.of(kind, self._socket)
        if subscription.whole:
            return there
        return {n: there[n] for n in sorted(subscription.names) if n in there}

    def _response(self, kind: Type, subscription: _Subscription, resources: Resources) -> Encoded | None:
        there = self._there(kind, subscription, resources)
        first = subscription.sent is None
        if subscription.sent is None:
            upserts = tuple(n for n, p in there.items() if subscription.has.get(n) != p.digest[:16])
            gone = frozenset(subscription.has.keys() - there.keys())
            subscription.has = {}
        elif subscription.sent is there and not subscription.stale and not subscription.fresh:
            return None
        else:
            delta = self._deltas.between(subscription.sent, there)
            upserts, gone = delta.upserts, frozenset(delta.removes)
            if subscription.fresh:
                again = [n for n in subscription.fresh if n in there and n not in upserts]
                upserts = (*upserts, *sorted(again))
        # A name that was asked for and is not there is answered too, by its removal.
        missing = subscription.fresh - there.keys()
        subscription.fresh = set()
        subscription.sent = there
        subscription.stale = (subscription.stale | gone) - there.keys()
        removes = tuple(sorted(missing))
        if subscription.stale and (kind in _LATER or self._routed(resources)):
            removes = tuple(sorted(missing | subscription.stale))
            subscription.stale = frozenset()
        if not (first or upserts or removes):
            return None
        return self._deltas.encode(kind, there, upserts, removes)

    def _routed(self, resources: Resources) -> bool:
        """True if listeners and routes are those of ``resources``, and the client has taken them."""
        for kind in _LATER:
            subscription = self._subscriptions.get(kind)
            if subscription and (
                subscription.waiting
                or subscription.error
                or subscription.stale
                or not self._current(kind, subscription, resources)
            ):
                return False
        return True
