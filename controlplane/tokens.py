"""Service-account tokens of our own pods as credentials: which node, which component, which pod.

A token is looked at here first (form, audience, account, and its signature where the issuer's keys are known), so that strangers
cost the API server nothing. Then a TokenReview says whether it is good, that is, whether its pod still lives. While the API
server is away the signature alone has to do, for pods that the controller knows. What a TokenReview said is believed for a
minute, or for as long as the controller sees the pod, whichever ends first; never beyond the token's own end.

Owns no pods: it is given a function that finds them. Tokens are kept as hashes and never logged.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import logs
from common.kubernetes import ApiError, Client, Unreachable
from controlplane.credentials import RIGHTS, Caller, CredentialsUnavailable
from controlplane.issuer import Issuer, Mismatch, UnknownIssuer

_log = logs.get(__name__)

AUDIENCE = "mycel.io"
_REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"
_EXTRA = "authentication.kubernetes.io/"
ACCOUNT_PREFIX = "mycel-"  #: service accounts are ``mycel-COMPONENT``

#: Seconds that a TokenReview is believed; that a refusal is; that a token checked without the API server is.
_GOOD_FOR = 60.0
_BAD_FOR = 5.0
_OFFLINE_FOR = 10.0
#: Seconds that a TokenReview may take before the API server counts as away, and that it is then not asked again.
_REVIEW_TIMEOUT = 3.0
_AWAY = 5.0
_REVIEWS_AT_ONCE = 8
_CACHE = 4096
#: Longest token: Kubernetes' own have about 1,100 bytes.
_MAX_TOKEN = 16 << 10

#: A pod's manifest by namespace and name, None if there is none.
FindPod = Callable[[str, str], "Mapping[str, Any] | None"]


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token says of itself. Nothing of it is proven yet."""

    caller: Caller
    key_id: str
    expires: float


@dataclass(frozen=True, slots=True)
class _Entry:
    caller: Caller | None
    until: float  #: monotonic


class TokenReviewCredentials:
    """Call it with the Client of the controller's own account; ``find_pod`` answers from the controller's view."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        find_pod: FindPod,
        keys: Path,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``keys``: file with the issuer's keys, for a start without the API server. ``clock`` is wall time."""
        self._client = client
        self._namespace = namespace
        self._find_pod = find_pod
        self._clock = clock
        self._monotonic = monotonic
        self._issuer = Issuer(client, keys, monotonic)
        self._cache: OrderedDict[bytes, _Entry] = OrderedDict()
        self._reviewing: dict[bytes, asyncio.Task[_Entry]] = {}
        self._slots = asyncio.Semaphore(_REVIEWS_AT_ONCE)
        self._away_until = 0.0
        #: UIDs of pods that were in the controller's view: one that is there no longer has ended.
        self._seen: dict[str, None] = {}

    async def follow_keys(self) -> None:
        """Keep the issuer's keys fresh; runs until cancelled."""
        await self._issuer.follow()

    async def caller(self, token: str) -> Caller | None:
        """As :meth:`controlplane.credentials.Credentials.caller`."""
        claims = read_claims(token, self._namespace) if len(token) <= _MAX_TOKEN else None
        if claims is None or claims.expires <= self._clock():
            return None
        key = hashlib.sha256(token.encode()).digest()
        entry = self._cache.get(key)
        if entry is None or entry.until <= self._monotonic():
            review = self._reviewing.get(key)
            if review is None:
                review = asyncio.get_running_loop().create_task(
                    self._check(token, claims), name="token-review"
                )
                self._reviewing[key] = review
                review.add_done_callback(lambda _: self._reviewing.pop(key, None))
            # One caller that gives up does not take the answer from the others.
            entry = await asyncio.shield(review)
            self._cache[key] = entry
            self._cache.move_to_end(key)
            while len(self._cache) > _CACHE:
                self._cache.popitem(last=False)
        if entry.caller is None or self._contradiction(entry.caller):
            return None
        return entry.caller

    def ended(self, caller: Caller) -> str:
        """As :meth:`controlplane.credentials.Credentials.ended`: the pod has ended or is another one by now."""
        return self._contradiction(caller)

    def _contradiction(self, caller: Caller) -> str:
        """What the controller's view of pods has against a caller.

        A pod that was never seen is no contradiction: the view may be a moment behind the API server.
        """
        pod = self._find_pod(caller.namespace, caller.pod)
        name = f"pod {caller.namespace}/{caller.pod}"
        if pod is None or pod["metadata"].get("uid") != caller.uid:
            return f"{name} of UID {caller.uid} is gone" if caller.uid in self._seen else ""
        if len(self._seen) >= _CACHE and caller.uid not in self._seen:
            del self._seen[next(iter(self._seen))]
        self._seen[caller.uid] = None
        spec, status = pod.get("spec") or {}, pod.get("status") or {}
        if spec.get("nodeName") != caller.node:
            return f"{name} lives on node {spec.get('nodeName')}, not {caller.node}"
        if spec.get("serviceAccountName") != f"{ACCOUNT_PREFIX}{caller.component}":
            return f"{name} has service account {spec.get('serviceAccountName')}"
        if status.get("phase") in ("Succeeded", "Failed"):
            return f"{name} has ended"
        return ""

    async def _check(self, token: str, claims: Claims) -> _Entry:
        unknown = ""
        try:
            await self._issuer.verify(token, claims.key_id, AUDIENCE, self._clock())
        except Mismatch as e:
            return self._refuse(claims, str(e))
        except UnknownIssuer as e:
            unknown = str(e)  # the API server has to say
        if self._monotonic() >= self._away_until:
            try:
                async with asyncio.timeout(_REVIEW_TIMEOUT), self._slots:
                    answer = await self._client.create(_REVIEWS, _review(token))
                return self._reviewed(answer, claims)
            except (ApiError, Unreachable, TimeoutError) as e:
                self._away_until = self._monotonic() + _AWAY
                _log.warning("token cannot be reviewed", error=str(e) or type(e).__name__)
        if unknown:
            raise CredentialsUnavailable(f"the API server is away, and of the token {unknown}")
        pod = self._find_pod(claims.caller.namespace, claims.caller.pod)
        if pod is None or pod["metadata"].get("uid") != claims.caller.uid:
            raise CredentialsUnavailable("the API server is away, and the pod is not known")
        return self._entry(claims, _OFFLINE_FOR)

    def _reviewed(self, answer: Mapping[str, Any], claims: Claims) -> _Entry:
        status = answer.get("status") or {}
        if not status.get("authenticated") or AUDIENCE not in (status.get("audiences") or ()):
            return self._refuse(claims, f"TokenReview: {status.get('error') or 'not authenticated'}")
        user = status.get("user") or {}
        extra = user.get("extra") or {}

        def one(name: str) -> str:
            values: list[str] = extra.get(_EXTRA + name) or []
            return values[0] if len(values) == 1 else ""

        caller = claims.caller
        account = f"system:serviceaccount:{caller.namespace}:{ACCOUNT_PREFIX}{caller.component}"
        said = (user.get("username"), one("node-name"), one("pod-name"), one("pod-uid"))
        if said != (account, caller.node, caller.pod, caller.uid):
            return self._refuse(claims, "TokenReview says otherwise than the token")
        return self._entry(claims, _GOOD_FOR)

    def _entry(self, claims: Claims, seconds: float) -> _Entry:
        against = self._contradiction(claims.caller)
        if against:
            return self._refuse(claims, against)
        return _Entry(
            claims.caller, self._monotonic() + min(seconds, max(claims.expires - self._clock(), 0.0))
        )

    def _refuse(self, claims: Claims, reason: str) -> _Entry:
        caller = claims.caller
        _log.warning("token refused", node=caller.node, pod=caller.pod, uid=caller.uid, reason=reason)
        return _Entry(None, self._monotonic() + _BAD_FOR)


def read_claims(token: str, namespace: str) -> Claims | None:
    """What a bound token says, if it is one of ours: our audience, one of our accounts, a pod and its node."""
    try:
        header, payload, _ = token.split(".")
        head, body = _json(header), _json(payload)
        audiences = body["aud"]
        bound = body["kubernetes.io"]
        account = bound["serviceaccount"]["name"]
        component = account.removeprefix(ACCOUNT_PREFIX)
        caller = Caller(
            node=bound["node"]["name"],
            component=component,
            namespace=bound["namespace"],
            pod=bound["pod"]["name"],
            uid=bound["pod"]["uid"],
        )
        key_id, expires, subject = head.get("kid", ""), float(body["exp"]), body["sub"]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    texts = (caller.node, caller.pod, caller.uid, key_id)
    if (
        not isinstance(audiences, list)
        or AUDIENCE not in audiences
        or not all(isinstance(t, str) for t in texts)
    ):
        return None
    if caller.namespace != namespace or account == component or component not in RIGHTS:
        return None
    if subject != f"system:serviceaccount:{namespace}:{account}" or not (
        caller.node and caller.pod and caller.uid
    ):
        return None
    return Claims(caller, key_id, expires)


def _json(part: str) -> Any:
    return json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))


def _review(token: str) -> dict[str, Any]:
    return {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": token, "audiences": [AUDIENCE]},
    }
