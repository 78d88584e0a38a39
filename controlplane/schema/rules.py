"""The CEL rules of the schemas, in Python: one function per rule, found by the rule's text (white space folded).

A rule that raises ValueError, TypeError, AttributeError or LookupError fails, as an evaluation error does in CEL.
Durations are Go's (``1h30m``, ``5s``, ``100ms``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
#: Go's longest duration (64 bits of nanoseconds).
_LONGEST_S = 2**63 // 10**9
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_LABEL = re.compile(r"[a-zA-Z0-9](?:[-a-zA-Z0-9]*[a-zA-Z0-9])?")


def duration(text: str) -> float:
    """A Go duration in seconds.

    :raises ValueError: it is none.
    """
    sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if rest == "0":
        return 0.0
    seconds, at = 0.0, 0
    while not at or at < len(rest):
        # Not findall: it would begin anew at each of a million digits without a unit.
        part = _DURATION.match(rest, at)
        if part is None:
            raise ValueError(f"{text[:60]!r} is no duration (like 5s, 100ms, 1h30m)")
        seconds += float(part[1]) * _SECONDS[part[2]]
        at = part.end()
    if seconds > _LONGEST_S:
        raise ValueError(f"{text[:60]!r} is no duration: longer than {_LONGEST_S} seconds")
    return sign * seconds


def _at_most_one(*names: str) -> Callable[[Any], bool]:
    return lambda self: sum(n in self for n in names) <= 1


def _image_url(self: str) -> bool:
    if _BAD_ESCAPE.search(self):
        return False
    return urlsplit(self).scheme in ("", "http", "https", "file", "oci") or "://" not in self


def _unix(self: str) -> str | None:
    return self[7:] if self.startswith("unix://") else None


def _path_is_absolute(self: str) -> bool:
    path = _unix(self)
    return path is None or path[:1] in ("/", "@")


def _waypoint_context(self: Any) -> bool:
    return bool(("waypoint" in self) == (self.get("context") == "WAYPOINT"))


def _service_accounts_alone(self: Any) -> bool:
    if "serviceAccounts" not in self and "notServiceAccounts" not in self:
        return True
    return not any(k in self for k in ("principals", "notPrincipals", "namespaces", "notNamespaces"))


def _port_level_has_selector(self: Any) -> bool:
    return "portLevelMtls" not in self or bool((self.get("selector") or {}).get("matchLabels"))


def _cidr_resolution(self: Any) -> bool:
    return not (
        any("/" in a for a in self.get("addresses", ()))
        and self.get("resolution", "NONE") not in ("STATIC", "NONE")
    )


def _distinct_numbers(self: Any) -> bool:
    numbers = [p["number"] for p in self]
    return len(set(numbers)) == len(numbers)


_SCHEME_LIST = '["", "http", "https", "{}", "{}"]'
_IMAGE = 'isURL(self) ? (url(self).getScheme() in {0}) : (isURL("http://" + self) && url("http://" + self).getScheme() in {0})'

RULES: dict[str, Callable[[Any], bool]] = {
    "(has(self.selector) ? 1 : 0) + (has(self.targetRefs) ? 1 : 0) <= 1": _at_most_one(
        "selector", "targetRefs"
    ),
    "(has(self.selector) ? 1 : 0) + (has(self.targetRef) ? 1 : 0) + (has(self.targetRefs) ? 1 : 0) <= 1": _at_most_one(
        "selector", "targetRef", "targetRefs"
    ),
    "(has(self.workloadSelector) ? 1 : 0) + (has(self.targetRefs) ? 1 : 0) <= 1": _at_most_one(
        "workloadSelector", "targetRefs"
    ),
    "(has(self.workloadSelector) ? 1 : 0) + (has(self.endpoints) ? 1 : 0) <= 1": _at_most_one(
        "workloadSelector", "endpoints"
    ),
    "(has(self.tlsCertificates) ? 1 : 0) + (has(self.credentialNames) ? 1 : 0) <= 1": _at_most_one(
        "tlsCertificates", "credentialNames"
    ),
    "(has(self.credentialName) ? 1 : 0) + (has(self.credentialNames) ? 1 : 0) <= 1": _at_most_one(
        "credentialName", "credentialNames"
    ),
    "(has(self.credentialNames) ? 1 : 0) + (has(self.tlsCertificates) ? 1 : 0) <= 1": _at_most_one(
        "credentialNames", "tlsCertificates"
    ),
    "(has(self.jwksUri) ? 1 : 0) + (has(self.jwks_uri) ? 1 : 0) + (has(self.jwks) ? 1 : 0) <= 1": _at_most_one(
        "jwksUri", "jwks_uri", "jwks"
    ),
    "has(self.wasm) != has(self.lua)": lambda self: ("wasm" in self) != ("lua" in self),
    'self.all(key, !key.contains("*"))': lambda self: not any("*" in k for k in self),
    "self.all(key, key.size() != 0)": lambda self: all(self),
    '!self.contains("*")': lambda self: "*" not in self,
    "self.size() == 0": lambda self: len(self) == 0,
    _IMAGE.format(_SCHEME_LIST.format("file", "oci")): _image_url,
    _IMAGE.format(_SCHEME_LIST.format("oci", "file")): _image_url,
    '(has(self.valueFrom) ? self.valueFrom : "") != "HOST" || !has(self.value)': lambda self: (
        self.get("valueFrom") != "HOST" or "value" not in self
    ),
    "duration(self) >= duration('1ms')": lambda self: duration(self) >= 0.001,
    'has(self.context) ? ((self.context == "WAYPOINT") ? has(self.waypoint) : !has(self.waypoint)) : !has(self.waypoint)': (
        _waypoint_context
    ),
    "0 < self && self <= 65535": lambda self: 0 < self <= 65535,
    '!((has(self.addresses) ? self.addresses : []).exists(k, k.contains("/")) && !((has(self.resolution) ?'
    ' self.resolution : "NONE") in ["STATIC", "NONE"]))': _cidr_resolution,
    '((has(self.resolution) ? self.resolution : "NONE") == "NONE") ? !has(self.endpoints) : true': lambda self: (
        self.get("resolution", "NONE") != "NONE" or "endpoints" not in self
    ),
    '((has(self.resolution) ? self.resolution : "") == "DNS_ROUND_ROBIN") ? ((has(self.endpoints) ? self.endpoints : [])'
    ".size() <= 1) : true": lambda self: (
        self.get("resolution") != "DNS_ROUND_ROBIN" or len(self.get("endpoints", ())) <= 1
    ),
    "has(self.address) || has(self.network)": lambda self: "address" in self or "network" in self,
    '(has(self.address) ? self.address : "").startsWith("unix://") ? !has(self.ports) : true': lambda self: (
        not self.get("address", "").startswith("unix://") or "ports" not in self
    ),
    'self.startsWith("unix://") ? (self.substring(7, 8) == "/" || self.substring(7, 8) == "@") : true': (
        _path_is_absolute
    ),
    'self.startsWith("unix://") ? !self.endsWith("/") : true': lambda self: (
        not (_unix(self) or "").endswith("/")
    ),
    'self.all(key, size(key) < 63 && key.matches("^[a-zA-Z0-9](?:[-a-zA-Z0-9]*[a-zA-Z0-9])?$"))': lambda self: (
        all(len(k) < 63 and _LABEL.fullmatch(k) for k in self)
    ),
    'self != "*"': lambda self: self != "*",
    "self.all(l1, self.exists_one(l2, l1.number == l2.number))": _distinct_numbers,
    'self in ["", "HTTP", "HTTPS"]': lambda self: self in ("", "HTTP", "HTTPS"),
    "(has(self.serviceAccounts) || has(self.notServiceAccounts)) ? (!has(self.principals) && !has(self.notPrincipals) &&"
    " !has(self.namespaces) && !has(self.notNamespaces)) : true": _service_accounts_alone,
    "has(self.portLevelMtls) ? (((has(self.selector) && has(self.selector.matchLabels)) ? self.selector.matchLabels : {})"
    ".size() > 0) : true": _port_level_has_selector,
    "self.all(key, 0 < int(key) && int(key) <= 65535)": lambda self: all(0 < int(k) <= 65535 for k in self),
    'url(self).getScheme() in ["http", "https"]': lambda self: urlsplit(self).scheme in ("http", "https"),
    '((has(self.operation) ? self.operation : "") == "UPSERT") ? (self.value != "") : true': lambda self: (
        self.get("operation") != "UPSERT" or bool(self.get("value"))
    ),
    '((has(self.operation) ? self.operation : "") == "REMOVE") ? !has(self.value) : true': lambda self: (
        self.get("operation") != "REMOVE" or "value" not in self
    ),
}
