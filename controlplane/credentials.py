"""Who is calling: a bearer credential to a node and a component of ours, and what that one may call.

Owns the rule of who may call what, the refusal of all others, and the credentials in a folder (one file for each node, with the
SHA-256 of its token). Service-account tokens are :mod:`controlplane.tokens`, behind the same :class:`Credentials`.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio
from prometheus_client import CollectorRegistry, Counter

from common import logs

_log = logs.get(__name__)
_PREFIX = "bearer "


class Right(enum.Enum):
    """A call that somebody may make."""

    DISCOVERY = "xDS"
    SUBSCRIBE = "Subscribe"
    SIGN = "Sign"
    REPLICAS = "Acknowledged"  #: what the other controllers ask


#: What each component needs, and so may call.
RIGHTS = {
    "agent": frozenset({Right.SUBSCRIBE}),
    "nodeproxy": frozenset({Right.SUBSCRIBE, Right.SIGN}),
    "l7proxy": frozenset({Right.DISCOVERY}),
    "controlplane": frozenset({Right.REPLICAS}),
}


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a credential belongs to. ``component`` is empty where the credential is a node's as a whole."""

    node: str
    component: str = ""
    namespace: str = ""  #: with ``pod`` and ``uid``: the pod that the credential is bound to
    pod: str = ""
    uid: str = ""

    def may(self, right: Right) -> bool:
        if not self.component:
            return right is not Right.REPLICAS
        return right in RIGHTS.get(self.component, frozenset())


class CredentialsUnavailable(Exception):
    """Nobody can tell now whether a credential is good: the caller shall come again."""


class Credentials(Protocol):
    async def caller(self, token: str) -> Caller | None:
        """Whom a token belongs to, or None. Called once for each stream and each certificate.

        :raises CredentialsUnavailable: it cannot be told now.
        """
        ...

    def ended(self, caller: Caller) -> str:
        """Why somebody who was let in may stay no longer; empty while all is well. Cheap: asked of every stream."""
        ...


class FolderCredentials:
    """Files named NODE with the hex SHA-256 of that node's token. Changes count at once; hidden files are ignored."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache: dict[str, tuple[tuple[int, int, int], str]] = {}

    async def caller(self, token: str) -> Caller | None:
        digest = hashlib.sha256(token.encode()).hexdigest()
        # All are compared, whichever matches.
        found = [node for node, expected in self._digests().items() if hmac.compare_digest(digest, expected)]
        if len(found) > 1:
            _log.error("several nodes have one token; it is good for none", nodes=",".join(sorted(found)))
            return None
        return Caller(found[0]) if found else None

    def ended(self, caller: Caller) -> str:
        # A credential that is withdrawn counts from the next stream on.
        return ""

    def _digests(self) -> dict[str, str]:
        fresh: dict[str, tuple[tuple[int, int, int], str]] = {}
        try:
            entries = list(os.scandir(self._folder))
        except OSError as e:
            _log.error(
                "credentials cannot be listed; nobody is let in", folder=str(self._folder), error=str(e)
            )
            return {}
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                status = entry.stat()
                signature = (status.st_mtime_ns, status.st_size, status.st_ino)
                known = self._cache.get(entry.name)
                if known is None or known[0] != signature:
                    known = signature, Path(entry.path).read_text("ascii").strip().lower()
            except (OSError, ValueError) as e:
                _log.error("credential cannot be read", node=entry.name, error=str(e))
                continue
            if len(known[1]) == 64:
                fresh[entry.name] = known
        self._cache = fresh
        return {node: digest for node, (_, digest) in fresh.items()}


def bearer_token(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The token of ``authorization: Bearer TOKEN``, if there is exactly one."""
    values = [v for k, v in metadata or () if k.lower() == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str) or not values[0].lower().startswith(_PREFIX):
        return None
    return values[0][len(_PREFIX) :].strip()


class Gate:
    """Lets callers in, each to what it needs; every refusal is logged and counted."""

    def __init__(self, credentials: Credentials, registry: CollectorRegistry) -> None:
        self._credentials = credentials
        self._refused = Counter(
            "mycel_controlplane_callers_refused", "Calls refused, by gRPC code.", ["code"], registry=registry
        )

    async def admit(self, context: grpc.aio.ServicerContext[Any, Any], right: Right) -> Caller:
        """The caller, or the end of the call.

        Codes: UNAUTHENTICATED (no credential, or a wrong one), PERMISSION_DENIED (not for this caller), UNAVAILABLE
        (nobody can tell now).
        """
        token = bearer_token(context.invocation_metadata())
        if not token:
            await self.refuse(
                context, grpc.StatusCode.UNAUTHENTICATED, "no bearer credential in the metadata"
            )
        try:
            caller = await self._credentials.caller(token)
        except CredentialsUnavailable as e:
            await self.refuse(
                context, grpc.StatusCode.UNAVAILABLE, f"the credential cannot be checked now: {e}"
            )
        if caller is None:
            await self.refuse(context, grpc.StatusCode.UNAUTHENTICATED, "the credential is unknown")
        if not caller.may(right):
            reason = f"{right.value} is not for {caller.component or 'a node'}"
            await self.refuse(context, grpc.StatusCode.PERMISSION_DENIED, reason, caller)
        return caller

    def ended(self, caller: Caller) -> str:
        """As :meth:`Credentials.ended`."""
        return self._credentials.ended(caller)

    async def refuse(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        code: grpc.StatusCode,
        reason: str,
        caller: Caller | None = None,
    ) -> NoReturn:
        """End a call."""
        self._refused.labels(code.name).inc()
        who = {"node": caller.node, "component": caller.component, "uid": caller.uid} if caller else {}
        _log.warning("caller refused", peer=context.peer(), code=code.name, reason=reason, **who)
        await context.abort(code, reason)
        raise AssertionError("abort() returns never")
