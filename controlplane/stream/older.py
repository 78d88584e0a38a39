"""What clients of an earlier version of the protocol are sent instead: never something that would allow more in their eyes.

They hear another version of the snapshot too: what they hold is less than all of it, and whoever comes after them on their node,
with the state that they left on its disk, has to be sent the whole.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from controlplane.api import API_VERSION, Action, Authorization, NetworkPolicy, Resource, Rule

_SEPARATOR = ":"


def version_for(api: int, snapshot: str) -> str:
    """A snapshot's version as a client of that version of the protocol is told it."""
    return snapshot if api >= API_VERSION else f"{api}{_SEPARATOR}{snapshot}"


def snapshot_of(version: str) -> str:
    """The snapshot's own version, whoever was told it."""
    return version.rpartition(_SEPARATOR)[2]


def resources(found: Iterable[Resource]) -> tuple[Resource, ...]:
    """For clients before :data:`controlplane.api.API_NETWORK`: no NetworkPolicy, no ALLOW that hangs on an address."""
    return tuple(
        _authorization(r) if isinstance(r, Authorization) else r
        for r in found
        if not isinstance(r, NetworkPolicy)
    )


def keys(found: Iterable[str]) -> tuple[str, ...]:
    """Keys of what such a client may have been sent."""
    return tuple(key for key in found if not key.startswith("network/"))


def _authorization(policy: Authorization) -> Authorization:
    """They do not read addresses: a DENY refuses more by that, and may stay."""
    if policy.action is Action.DENY or not any(
        s.ip_blocks or s.not_ip_blocks for r in policy.rules for s in r.sources
    ):
        return policy
    rules = []
    for rule in policy.rules:
        sources = tuple(s for s in rule.sources if not (s.ip_blocks or s.not_ip_blocks))
        # Without any source left it would match everybody.
        if sources or not rule.sources:
            rules.append(Rule(sources, rule.operations))
    return replace(policy, rules=tuple(rules))
