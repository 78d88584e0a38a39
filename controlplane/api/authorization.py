"""L4 authorization: the model, and the one function that judges a connection by it.

Semantics are Istio's (security.istio.io AuthorizationPolicy, "Action" and "Rule"): of the policies that select the
destination workload, any DENY that matches refuses; else, with no ALLOW policy the connection is allowed; else it needs an
ALLOW that matches. A rule that names an identity never matches a connection without one.

What L4 cannot see is decided by the compiler before it comes here (as ztunnel does): an ALLOW rule with an HTTP attribute
never matches (it is left out), a DENY rule loses that attribute (and matches more). The doubt always goes to refusal.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import msgspec

from controlplane.api.addresses import in_blocks


class Action(enum.Enum):
    """What a policy does with a connection that one of its rules matches."""

    ALLOW = "ALLOW"
    DENY = "DENY"


class Source(msgspec.Struct, frozen=True):
    """Who may connect. Each non-empty field has to match (AND); within a field one value is enough (OR).

    Values are Istio's patterns: exact, ``prefix*``, ``*suffix``, or ``*`` (any non-empty). Principals are SPIFFE IDs
    without ``spiffe://``, as in Istio (``cluster.local/ns/default/sa/client``).
    """

    principals: tuple[str, ...] = ()
    not_principals: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    not_namespaces: tuple[str, ...] = ()
    #: the client's address as the connection shows it: blocks in canonical form (``10.0.0.0/8``, ``fd00::/8``)
    ip_blocks: tuple[str, ...] = ()
    not_ip_blocks: tuple[str, ...] = ()


class Operation(msgspec.Struct, frozen=True):
    """Which ports, as the destination workload sees them (target ports, not service ports)."""

    ports: tuple[int, ...] = ()
    not_ports: tuple[int, ...] = ()


class Rule(msgspec.Struct, frozen=True):
    """Matches if any source matches (or none is given) and any operation matches (or none is given)."""

    sources: tuple[Source, ...] = ()
    operations: tuple[Operation, ...] = ()


class Authorization(msgspec.Struct, frozen=True, tag="authorization"):
    """One AuthorizationPolicy as L4 sees it. Which workloads it selects stands in ``Workload.policies``.

    A policy without rules matches nothing: with ALLOW it refuses everything (Istio's *allow-nothing*).
    """

    namespace: str
    name: str
    action: Action
    rules: tuple[Rule, ...] = ()


class Verdict(msgspec.Struct, frozen=True):
    """The outcome, and the policy that decided it (``namespace/name``; empty where no policy did)."""

    allowed: bool
    policy: str = ""


def authorize(
    policies: Iterable[Authorization], principal: str | None, port: int, address: str | None = None
) -> Verdict:
    """Judge one connection.

    :param policies: those that select the destination workload, in any order.
    :param principal: the client's SPIFFE ID without ``spiffe://``, or None for a connection without identity.
    :param port: the destination's own port (after service translation).
    :param address: the client's address; None: not known, so that a rule which asks for it allows nobody and refuses everybody.
    """
    allows = False
    allowed_by = ""
    for policy in policies:
        doubt = policy.action is Action.DENY
        matched = any(_rule_matches(rule, principal, port, address, doubt) for rule in policy.rules)
        if policy.action is Action.DENY:
            if matched:
                return Verdict(False, f"{policy.namespace}/{policy.name}")
        else:
            allows = True
            if matched and not allowed_by:
                allowed_by = f"{policy.namespace}/{policy.name}"
    return Verdict(not allows or bool(allowed_by), allowed_by)


def _rule_matches(rule: Rule, principal: str | None, port: int, address: str | None, doubt: bool) -> bool:
    return (
        not rule.sources or any(_source_matches(s, principal, address, doubt) for s in rule.sources)
    ) and (not rule.operations or any(_operation_matches(o, port) for o in rule.operations))


def _source_matches(source: Source, principal: str | None, address: str | None, doubt: bool) -> bool:
    namespace = _namespace_of(principal)
    # A negated attribute is judged on what is not there too: without an identity, "not this principal" holds.
    # Istio compiles it the same way (not_id over an absent value). An address is always there: not to know it is doubt.
    return (
        (not source.principals or _any(source.principals, principal))
        and not (source.not_principals and _any(source.not_principals, principal))
        and (not source.namespaces or _any(source.namespaces, namespace))
        and not (source.not_namespaces and _any(source.not_namespaces, namespace))
        and _address_matches(source, address, doubt)
    )


def _address_matches(source: Source, address: str | None, doubt: bool) -> bool:
    if not source.ip_blocks and not source.not_ip_blocks:
        return True
    if address is None:
        return doubt
    return (not source.ip_blocks or in_blocks(address, source.ip_blocks)) and not in_blocks(
        address, source.not_ip_blocks
    )


def _operation_matches(operation: Operation, port: int) -> bool:
    return (not operation.ports or port in operation.ports) and port not in operation.not_ports


def _any(patterns: tuple[str, ...], value: str | None) -> bool:
    return value is not None and any(pattern_matches(p, value) for p in patterns)


def pattern_matches(pattern: str, value: str) -> bool:
    if pattern == "*":
        return value != ""
    if pattern.startswith("*"):
        return value.endswith(pattern[1:])
    if pattern.endswith("*"):
        return value.startswith(pattern[:-1])
    return value == pattern


def _namespace_of(principal: str | None) -> str | None:
    if principal is None:
        return None
    parts = principal.split("/")
    return parts[2] if len(parts) == 5 and parts[1] == "ns" and parts[3] == "sa" else None
