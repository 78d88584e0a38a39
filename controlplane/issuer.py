"""The public keys of the cluster's service-account issuer, and signatures checked by them.

Owns fetching (from the API server's discovery documents, at the start, hourly, and when a token names a key that is not known)
and a copy on disk, so that a controller that restarts while the API server is away goes on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from common import logs
from common.kubernetes import ApiError, Client, Unreachable

_log = logs.get(__name__)
_CONFIGURATION = "/.well-known/openid-configuration"
_KEYS = "/openid/v1/jwks"
#: What Kubernetes signs with (RSA, ECDSA), and no symmetric algorithm.
_ALGORITHMS = ["RS256", "RS384", "RS512", "ES256", "ES384", "ES512"]
_EVERY = 3600.0
#: Seconds until keys are fetched again after they could not be, or because a token names another one.
_AGAIN = 10.0
#: Seconds that our clock may be behind the API server's: a pod's first token is a moment old.
_LEEWAY = 300


class Mismatch(Exception):
    """The token is not what it claims to be: signature, audience or time."""


class UnknownIssuer(Exception):
    """The token's key, or the issuer that it names, is not known (yet)."""


class Issuer:
    """``path``: where the keys are kept between runs."""

    def __init__(self, client: Client, path: Path, monotonic: Callable[[], float]) -> None:
        self._client = client
        self._path = path
        self._monotonic = monotonic
        self._name = ""
        self._keys: KeySet | None = None
        self._ids: frozenset[str] = frozenset()
        self._asked_at = float("-inf")
        self._fetched = False  #: when they were asked for last, they were to be had
        self._asking = asyncio.Lock()
        try:
            self._take(json.loads(path.read_bytes()))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, TypeError, JoseError) as e:
            _log.error("issuer's keys cannot be read; fetched anew", path=str(path), error=str(e))

    async def follow(self) -> None:
        """Fetch keys hourly, sooner while there are none; runs until cancelled."""
        while True:
            fetched = await self.fetch()
            await asyncio.sleep(_EVERY if fetched else _AGAIN)

    async def fetch(self) -> bool:
        """Fetch the keys now; False if they cannot be had."""
        self._asked_at = self._monotonic()
        self._fetched = False
        try:
            async with asyncio.timeout(_AGAIN):
                configuration = await self._client.get(_CONFIGURATION)
                keys = await self._client.get(_KEYS)
            document = {"issuer": configuration["issuer"], "keys": keys}
            self._take(document)
            self._fetched = True
        except (ApiError, Unreachable, TimeoutError, ValueError, LookupError, TypeError, JoseError) as e:
            _log.warning("issuer's keys cannot be fetched", error=str(e) or type(e).__name__)
            return False
        try:
            temporary = self._path.with_name(self._path.name + ".new")
            temporary.write_text(json.dumps(document))
            temporary.replace(self._path)
        except OSError as e:
            _log.error("issuer's keys cannot be kept", path=str(self._path), error=str(e))
        return True

    async def verify(self, token: str, key_id: str, audience: str, now: float) -> None:
        """Check signature, issuer, audience and time (``now``: seconds since the epoch).

        :raises Mismatch: the token is no good.
        :raises UnknownIssuer: its key, or who it says has issued it, is not known, nor to be had now.
        """
        if key_id not in self._ids:
            async with self._asking:
                if key_id not in self._ids and self._monotonic() >= self._asked_at + _AGAIN:
                    await self.fetch()
        keys = self._keys
        if self._fetched and self._ids and key_id not in self._ids:
            # The API server has all keys that are good in its document: what a stranger makes up costs it no review.
            raise Mismatch("its key is none of the issuer's")
        if keys is None or key_id not in self._ids:
            raise UnknownIssuer("the issuer's key is not known")
        try:
            claims = jwt.decode(token, keys, algorithms=_ALGORITHMS).claims
        except (JoseError, ValueError, TypeError) as e:
            raise Mismatch(f"signature: {e}") from e
        audiences = claims.get("aud")
        if not isinstance(audiences, list) or audience not in audiences:
            raise Mismatch("the token is for another audience")
        expires, not_before = claims.get("exp"), claims.get("nbf", 0)
        if not isinstance(expires, int | float) or not isinstance(not_before, int | float):
            raise Mismatch("the token does not say when it ends")
        if not not_before - _LEEWAY <= now < expires:
            raise Mismatch("the token's time is not now")
        if claims.get("iss") != self._name:
            # A cluster may have several issuers, of which only the first is told, and may be given another one at any time.
            raise UnknownIssuer("the issuer is not the one that is known")

    def _take(self, document: Mapping[str, Any]) -> None:
        name, keys = document["issuer"], KeySet.import_key_set(document["keys"])
        if not isinstance(name, str) or not name:
            raise ValueError("no issuer")
        ids = frozenset(k.kid for k in keys.keys if k.kid)
        if ids != self._ids:
            _log.info("issuer's keys", issuer=name, keys=len(ids))
        self._name, self._keys, self._ids = name, keys, ids
