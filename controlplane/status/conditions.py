"""A verdict in the shape that a kind's ``.status`` has, put into the status that is there: what others wrote stays.

Shapes: conditions (Istio, Linkerd, ours), and the Gateway API's ``parents`` for routes, of which only entries under our
controllerName are ours (Gateway API, "Route status"). Pure; writing is :mod:`~controlplane.status.writer`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from controlplane.status.board import Outcome, Verdict
from controlplane.status.kinds import CONTROLLER

GATEWAY_API = "gateway.networking.k8s.io"
#: Groups whose routes have a status for each parent.
_ROUTE_GROUPS = (GATEWAY_API, "policy.linkerd.io")
_ROUTES = ("HTTPRoute", "GRPCRoute", "TCPRoute", "TLSRoute", "UDPRoute")
_CLASSED = ("GatewayClass", "Gateway")

#: True if the parent that a parentRef of a route in a namespace names is ours to serve.
OwnParent = Callable[[Mapping[str, Any], str], bool]
#: True if a Gateway or GatewayClass names our controller.
OwnGateway = Callable[[Mapping[str, Any]], bool]


def conditions_of(verdict: Verdict) -> dict[str, tuple[str, str, str]]:
    """Condition types to (status, reason, message)."""
    outcome = verdict.outcome
    if outcome is Outcome.REFUSED:
        programmed = "the last good version is in force" if verdict.in_force else "nothing of it is in force"
        return {
            "Accepted": ("False", verdict.reason, verdict.message),
            "Programmed": ("False", verdict.reason, programmed),
        }
    if outcome is Outcome.NOT_COMPILED:
        return {
            "Accepted": ("False", verdict.reason, verdict.message),
            "Programmed": ("False", verdict.reason, ""),
        }
    accepted = ("True", verdict.reason, verdict.message)
    if outcome is Outcome.ACCEPTED:
        return {"Accepted": accepted, "Programmed": ("False", "Pending", f"waiting for {verdict.waiting}")}
    return {"Accepted": accepted, "Programmed": ("True", "Programmed", "acknowledged by every node")}


def status_of(
    manifest: Mapping[str, Any], verdict: Verdict, now: str, own_parent: OwnParent, own_gateway: OwnGateway
) -> dict[str, Any] | None:
    """The fields of ``.status`` that have to change, whole; None if nothing has to, or the object is another's to serve.

    :param manifest: the object as it is now, with its status.
    :param now: RFC 3339.
    """
    group = verdict.key.group
    status: Mapping[str, Any] = manifest.get("status") or {}
    generation = manifest["metadata"].get("generation")
    wanted = conditions_of(verdict)
    if group in _ROUTE_GROUPS and verdict.key.kind in _ROUTES:
        return _parents(manifest, status, wanted, generation, now, own_parent)
    if group == GATEWAY_API and verdict.key.kind in _CLASSED and not own_gateway(manifest):
        return None
    if group == GATEWAY_API and verdict.key.kind not in _CLASSED:
        return None  # what is no Gateway and no route has statuses per ancestor, or none
    if verdict.key.kind == "GatewayClass":
        wanted = {"Accepted": wanted["Accepted"]}
    conditions = _merge(status.get("conditions") or (), wanted, generation, now)
    changes: dict[str, Any] = {}
    if conditions != list(status.get("conditions") or ()):
        changes["conditions"] = conditions
    if group.endswith("istio.io"):
        # protobuf's JSON writes an int64 as text; both mean the same.
        if str(status.get("observedGeneration", "")) != str(generation):
            changes["observedGeneration"] = generation
    elif group == "policy.linkerd.io" and verdict.key.kind == "HTTPLocalRateLimitPolicy" and changes:
        changes["targetRef"] = (manifest.get("spec") or {}).get("targetRef")
    return changes or None


def said_programmed(manifest: Mapping[str, Any]) -> bool:
    """True if the status says that this generation is programmed."""
    status = manifest.get("status") or {}
    generation = manifest["metadata"].get("generation")
    lists = [status.get("conditions")] + [
        p.get("conditions") for p in status.get("parents") or () if p.get("controllerName") == CONTROLLER
    ]
    return any(
        c.get("type") == "Programmed"
        and c.get("status") == "True"
        and c.get("observedGeneration") == generation
        for conditions in lists
        for c in conditions or ()
    )


def _parents(
    manifest: Mapping[str, Any],
    status: Mapping[str, Any],
    wanted: dict[str, tuple[str, str, str]],
    generation: Any,
    now: str,
    own_parent: OwnParent,
) -> dict[str, Any] | None:
    namespace = manifest["metadata"].get("namespace") or ""
    refs = [r for r in (manifest.get("spec") or {}).get("parentRefs") or () if own_parent(r, namespace)]
    before = list(status.get("parents") or ())
    others = [p for p in before if p.get("controllerName") != CONTROLLER]
    own = {_ref(p.get("parentRef") or {}): p for p in before if p.get("controllerName") == CONTROLLER}
    # What a route refers to is looked at when it is compiled, and not before.
    compiled = wanted["Accepted"][0] == "True"
    resolved = ("True", "ResolvedRefs", "") if compiled else ("Unknown", "Pending", "")
    entries = []
    for ref in refs:
        known = own.get(_ref(ref)) or {}
        conditions = _merge(
            known.get("conditions") or (), wanted | {"ResolvedRefs": resolved}, generation, now
        )
        entries.append(
            dict(known) | {"parentRef": ref, "controllerName": CONTROLLER, "conditions": conditions}
        )
    # Ours keep their places, so that nothing is written that only moved.
    positions = {
        _ref(p.get("parentRef") or {}): i
        for i, p in enumerate(before)
        if p.get("controllerName") == CONTROLLER
    }
    entries.sort(key=lambda e: positions.get(_ref(e["parentRef"]), len(before)))
    after: list[Any] = []
    remaining = iter(entries)
    for parent in before:
        after += [parent] if parent in others else [e for e in [next(remaining, None)] if e]
    after += list(remaining)
    return {"parents": after} if after != before else None


def _ref(ref: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(ref.get(n) for n in ("group", "kind", "namespace", "name", "sectionName", "port"))


def _merge(
    there: Sequence[Mapping[str, Any]], wanted: Mapping[str, tuple[str, str, str]], generation: Any, now: str
) -> list[dict[str, Any]]:
    """Ours in place of those of the same type, all others untouched."""
    result = []
    left = dict(wanted)
    for condition in there:
        ours = left.pop(condition.get("type", ""), None)
        result.append(dict(condition) if ours is None else _condition(condition, ours, generation, now))
    return result + [_condition({"type": kind}, ours, generation, now) for kind, ours in left.items()]


def _condition(
    there: Mapping[str, Any], wanted: tuple[str, str, str], generation: Any, now: str
) -> dict[str, Any]:
    status, reason, message = wanted
    since = there.get("lastTransitionTime") if there.get("status") == status else None
    result = {
        "type": there["type"],
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": since or now,
    }
    if generation is not None:
        result["observedGeneration"] = generation
    return result
