"""One admission.k8s.io/v1 AdmissionReview: a request in, a response out. Pure: no time, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from common import logs
from controlplane.source import Validator

_log = logs.get(__name__)
_API_VERSION = "admission.k8s.io/v1"
#: Causes in a refusal, and characters of each; of more causes only the number is told.
_MAX_CAUSES = 20
_MAX_TEXT = 500
#: In place of a name that the API server has yet to make (metadata.generateName).
_NO_NAME = "generated"


class MalformedReview(Exception):
    """What came is no AdmissionReview v1 with an object."""


def review(
    body: object, validate: Validator, in_force: Callable[[str, str], bool] = lambda group, kind: True
) -> dict[str, Any]:
    """The answer to an AdmissionReview.

    An object is refused if ``validate`` finds something wrong with it and it is new, or its specification is another than
    before. Whoever only touches its metadata (a finalizer, say) is told by a warning. ``in_force`` says whether a kind
    (group, kind) has an effect at all; if not, that is a warning.

    :raises MalformedReview: see there.
    """
    uid, request = _request(body)
    new, old = request.get("object"), request.get("oldObject")
    if request.get("operation") not in ("CREATE", "UPDATE"):
        return _answer(uid, True)
    if not isinstance(new, dict):
        raise MalformedReview("request.object is no object")
    manifest = _manifest(new, request)
    if manifest["metadata"].get("deletionTimestamp"):
        # It is going: what is left to change are its finalizers.
        return _answer(uid, True)
    try:
        problems = list(validate(manifest))
    except Exception as e:
        # A bug of ours costs nobody the right to write; the source will say what it makes of the object.
        _log.exception("object cannot be judged", e, kind=manifest["kind"], name=manifest["metadata"]["name"])
        return _answer(uid, True, warnings=[f"mycel cannot judge this object: {type(e).__name__}"])
    if not problems:
        group = manifest["apiVersion"].rpartition("/")[0]
        if in_force(group, manifest["kind"]):
            return _answer(uid, True)
        return _answer(uid, True, warnings=[f"mycel reads {manifest['kind']}, it is not in force yet"])
    problems = [(field[:_MAX_TEXT], reason[:_MAX_TEXT]) for field, reason in problems]
    texts = [f"{field}: {reason}" if field else reason for field, reason in problems]
    if isinstance(old, dict) and _content(old) == _content(new):
        return _answer(uid, True, warnings=[f"mycel: not in force as written: {t}" for t in texts[:5]])
    return _answer(uid, False, status=_refusal(manifest, request, problems, texts))


def _request(body: object) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(body, dict):
        raise MalformedReview("the body is no object")
    if body.get("apiVersion") != _API_VERSION or body.get("kind") != "AdmissionReview":
        raise MalformedReview(f"the body is no AdmissionReview of {_API_VERSION}")
    request = body.get("request")
    if not isinstance(request, dict) or not isinstance(request.get("uid"), str):
        raise MalformedReview("request.uid is missing")
    return request["uid"], request


def _manifest(new: dict[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """The object as sources would read it."""
    metadata = new.get("metadata")
    api_version, kind = new.get("apiVersion"), new.get("kind")
    if not isinstance(metadata, dict) or not isinstance(api_version, str) or not isinstance(kind, str):
        raise MalformedReview("request.object has no apiVersion, kind or metadata")
    filled = {**metadata, "name": metadata.get("name") or request.get("name") or _NO_NAME}
    if request.get("namespace"):
        filled["namespace"] = request["namespace"]
    return {k: v for k, v in new.items() if k != "status"} | {"metadata": filled}


def _content(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in manifest.items() if k not in ("apiVersion", "metadata", "status")}


def _refusal(
    manifest: Mapping[str, Any],
    request: Mapping[str, Any],
    problems: Iterable[tuple[str, str]],
    texts: list[str],
) -> dict[str, Any]:
    """A metav1.Status, as the API server's own for an invalid object."""
    causes = [{"reason": "FieldValueInvalid", "field": f, "message": r} for f, r in problems]
    shown = "; ".join(texts[:_MAX_CAUSES])
    if len(texts) > _MAX_CAUSES:
        shown += f"; and {len(texts) - _MAX_CAUSES} more"
    name, kind = str(manifest["metadata"]["name"])[:_MAX_TEXT], manifest["kind"][:_MAX_TEXT]
    of = request.get("kind")
    return {
        "status": "Failure",
        "code": 422,
        "reason": "Invalid",
        "message": f"{kind} {name!r} is invalid: {shown}",
        "details": {
            "name": name,
            "group": (of.get("group") if isinstance(of, dict) else None) or "",
            "kind": kind,
            "causes": causes[:_MAX_CAUSES],
        },
    }


def _answer(
    uid: str, allowed: bool, *, status: dict[str, Any] | None = None, warnings: list[str] | None = None
) -> dict[str, Any]:
    response: dict[str, Any] = {"uid": uid, "allowed": allowed}
    if status is not None:
        response["status"] = status
    if warnings:
        # Longer ones are cut by the API server, at 256 bytes where there are many.
        response["warnings"] = [w[:250] for w in warnings]
    return {"apiVersion": _API_VERSION, "kind": "AdmissionReview", "response": response}
