"""Who is calling: a bearer credential to the name of a node.

Today a folder with one file per node, holding the SHA-256 of its token; a service-account token (TokenReview) comes behind the
same :class:`Credentials`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio

from common import logs

_log = logs.get(__name__)
_PREFIX = "bearer "


class Credentials(Protocol):
    async def node_of(self, token: str) -> str | None:
        """The node that a token belongs to, or None. Called once for each stream and each certificate."""
        ...


class FolderCredentials:
    """Files named NODE with the hex SHA-256 of that node's token. Changes count at once; hidden files are ignored."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache: dict[str, tuple[tuple[int, int, int], str]] = {}

    async def node_of(self, token: str) -> str | None:
        digest = hashlib.sha256(token.encode()).hexdigest()
        # All are compared, whichever matches.
        found = [node for node, expected in self._digests().items() if hmac.compare_digest(digest, expected)]
        if len(found) > 1:
            _log.error("several nodes have one token; it is good for none", nodes=",".join(sorted(found)))
            return None
        return found[0] if found else None

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


async def authenticate(credentials: Credentials, context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The calling node's name; ends the call with UNAUTHENTICATED if there is none."""
    token = bearer_token(context.invocation_metadata())
    node = await credentials.node_of(token) if token else None
    if node is None:
        reason = "the credential is unknown" if token else "no bearer credential in the metadata"
        _log.warning("caller refused", peer=context.peer(), reason=reason)
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, reason)
        raise AssertionError("abort() returns never")
    return node
