"""What is in force in the place of a policy that is refused, of which no version ever was good: the strictest it may have meant.

An object that is refused keeps its last good version. Where there is none (it is new, or a controller starts without its state,
or judges more strictly than the one before) its absence would allow what it was written to forbid. So a stand-in of its kind
selects what it selects, as far as that can be told, and refuses there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from controlplane import schema
from controlplane.istio import GROUP_SECURITY
from controlplane.model import networkpolicy
from controlplane.source import Fault, Key, Object, State

_AUTHORIZATION = (GROUP_SECURITY, "AuthorizationPolicy")
_AUTHENTICATION = (GROUP_SECURITY, "PeerAuthentication")
_NETWORK = (networkpolicy.GROUP, networkpolicy.KIND)
_LAX = ("PERMISSIVE", "DISABLE", "UNSET")
_METADATA = {"uid": str, "generation": int, "creationTimestamp": str}


def in_force(state: State) -> tuple[Mapping[Key, Object], tuple[Fault, ...]]:
    """The state's objects, with a stand-in for each refused policy that has no good version; and a fault for each of those."""
    found = {
        key: made
        for key, refused in state.refused.items()
        if key not in state.objects and (made := stand_in(refused))
    }
    if not found:
        return state.objects, ()
    return {**state.objects, **found}, tuple(_fault(o) for o in found.values())


def stand_in(refused: Object) -> Object | None:
    """The stand-in of one object; None if its kind forbids nothing, or it was not meant to."""
    kind = (refused.key.group, refused.key.kind)
    written = refused.manifest.get("spec")
    spec: Mapping[str, Any] = written if isinstance(written, dict) else {}
    if kind == _AUTHORIZATION:
        made = _authorization(refused, spec)
    elif kind == _AUTHENTICATION:
        made = _authentication(refused, spec)
    elif kind == _NETWORK:
        made = _network(refused, spec)
    else:
        return None
    if made is None:
        return None
    metadata = refused.manifest["metadata"]
    kept = {n: metadata[n] for n, t in _METADATA.items() if isinstance(metadata.get(n), t)}
    manifest = {
        "apiVersion": _version(refused),
        "kind": refused.key.kind,
        "metadata": {"name": refused.key.name, "namespace": refused.key.namespace, **kept},
        "spec": made,
    }
    return Object(refused.key, manifest, refused.file, stand_in=True)


def _fault(o: Object) -> Fault:
    strict = o.key.kind == "PeerAuthentication"
    effect = "STRICT holds" if strict else "everything is refused"
    reason = f"no version of it was ever good: {effect} where it may apply"
    return Fault(o.file, str(o.key), "", reason, "correct it, or remove it", o.key)


def _authorization(refused: Object, spec: Mapping[str, Any]) -> dict[str, Any] | None:
    annotations = refused.manifest["metadata"].get("annotations")
    dry = isinstance(annotations, dict) and annotations.get("istio.io/dry-run") == "true"
    action = spec.get("action") or "ALLOW"
    if dry or action == "AUDIT":
        return None
    selected = _selected(
        refused, spec, ("selector", "targetRef", "targetRefs"), ("action", "rules", "provider")
    )
    # An ALLOW without rules allows nothing, and leaves other policies' ALLOW as it is.
    return (
        {**selected, "action": "ALLOW"}
        if action == "ALLOW"
        else {**selected, "action": "DENY", "rules": [{}]}
    )


def _authentication(refused: Object, spec: Mapping[str, Any]) -> dict[str, Any] | None:
    mtls = spec.get("mtls")
    mode = mtls.get("mode") if isinstance(mtls, dict) else None
    if mode in _LAX and not spec.get("portLevelMtls"):
        return None
    return {**_selected(refused, spec, ("selector",), ("mtls", "portLevelMtls")), "mtls": {"mode": "STRICT"}}


def _network(refused: Object, spec: Mapping[str, Any]) -> dict[str, Any] | None:
    types = spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]
    known = isinstance(types, list) and all(t in ("Ingress", "Egress") for t in types)
    if not known or not spec.keys() <= {"podSelector", "policyTypes", "ingress", "egress"}:
        types = ["Ingress", "Egress"]
    selected = _selected(refused, spec, ("podSelector",), ("policyTypes", "ingress", "egress"))
    return {**selected, "policyTypes": types}


def _selected(
    refused: Object, spec: Mapping[str, Any], selecting: tuple[str, ...], others: tuple[str, ...]
) -> dict[str, Any]:
    """The fields that say whom it selects; none, which is all of its scope, if they or a field beside them cannot be read."""
    if not spec.keys() <= {*selecting, *others}:
        return {}  # one of them may be the selector, misspelt
    found = {field: spec[field] for field in selecting if field in spec}
    alone = {
        "apiVersion": _version(refused),
        "kind": refused.key.kind,
        "metadata": {"name": "x"},
        "spec": found,
    }
    return {} if any(_problems(alone)) else found


def _problems(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from schema.validate(manifest)
    if manifest["kind"] == networkpolicy.KIND:
        yield from networkpolicy.validate(manifest["spec"])


def _version(refused: Object) -> str:
    """One that its kind has, whatever is written."""
    versions = schema.versions(refused.key.group, refused.key.kind)
    return f"{refused.key.group}/{versions[0] if versions else 'v1'}"
