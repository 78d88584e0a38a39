"""Whether an end is for good: asked of the API server when the agent is told to end.

An upgrade ends the agent's pod and starts another, a removal of the mesh ends it and starts none. Only the second may take the
mesh off the node, so whatever is not certainly a removal is an upgrade: no answer, no right to ask, an error of any other kind.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time

from common import logs
from common.kubernetes import Access, AccessError, ApiError, Client, Unreachable, path_of

_log = logs.get(__name__)

#: Seconds for all attempts together. An API server goes by a token for ten seconds after its account is gone, and whoever
#: removes the mesh may have taken the right to ask before; kubelet leaves the pod thirty to end.
PATIENCE = 15.0
_ATTEMPT = 3.0
_AGAIN = 0.5
#: So many refusals of our token in a row say that the service account is gone; one may be a server that is just starting.
_REFUSALS = 3


async def for_good(daemon_set: str, access: Access | None = None, *, patience: float = PATIENCE) -> bool:
    """True if the DaemonSet ``NAMESPACE/NAME`` that runs this agent is gone or going, or our own service account is.

    :param access: default: as a pod of the cluster.
    """
    namespace, _, name = daemon_set.partition("/")
    path = path_of("apps/v1", "daemonsets", namespace, name)
    deadline = time.monotonic() + patience
    refused = 0
    while True:
        try:
            asking = access or Access.in_cluster()
            async with Client(asking, timeout=_ATTEMPT) as client:
                found = await client.get(path)
            going = bool(found.get("metadata", {}).get("deletionTimestamp"))
            _log.info("asked whether the mesh leaves this node", daemon_set=daemon_set, leaves=going)
            return going
        except ApiError as error:
            refused += error.status == 401 and not _has_expired(asking.token)
            if (error.status, error.reason) == (404, "NotFound") or refused == _REFUSALS:
                _log.info("the mesh leaves this node", daemon_set=daemon_set, reason=str(error))
                return True
            reason = str(error)
        except (Unreachable, AccessError) as error:
            reason = str(error)
        if time.monotonic() + _AGAIN > deadline:
            _log.warning(
                "the mesh stays on this node: nobody says otherwise", daemon_set=daemon_set, reason=reason
            )
            return False
        await asyncio.sleep(_AGAIN)


def _has_expired(token: str | None) -> bool:
    """One that ran out (kubelet was away for longer than it lives) is refused whether its account is there or not."""
    try:
        claims = json.loads(base64.urlsafe_b64decode(f"{(token or '').split('.')[1]}=="))
        return bool(claims["exp"] <= time.time())
    except (ValueError, LookupError, TypeError):
        return False
