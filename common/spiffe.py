"""SPIFFE IDs and trust domains: parse, build, match (SPIFFE-ID, sections 2.1 and 2.2).

Owns the text form of identities and nothing else: no certificates, no Kubernetes objects. Parsing is strict and never
normalizes: what is accepted is byte for byte what is compared, so two texts are one identity only if they are equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_SCHEME = "spiffe://"
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]+", re.ASCII)
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)

#: The most bytes that a SPIFFE ID (2048) and a trust domain name (255) may have (SPIFFE-ID, section 2.3).
MAX_ID = 2048
MAX_TRUST_DOMAIN = 255


class SpiffeError(ValueError):
    """The text is no SPIFFE ID, trust domain or path, or an ID is not the one that was expected."""


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """``spiffe://TRUST-DOMAIN/PATH``; ``path`` is empty or begins with a slash. Build it with the functions below."""

    trust_domain: str
    path: str = ""

    def __str__(self) -> str:
        return f"{_SCHEME}{self.trust_domain}{self.path}"

    @property
    def principal(self) -> str:
        """The ID without its scheme, as Istio's policies write it."""
        return f"{self.trust_domain}{self.path}"

    def replace_path(self, path: str) -> SpiffeId:
        """:raises SpiffeError: ``path`` is no valid path."""
        check_path(path)
        return SpiffeId(self.trust_domain, path)

    def append_path(self, path: str) -> SpiffeId:
        """:raises SpiffeError: ``path`` is no valid path."""
        check_path(path)
        return SpiffeId(self.trust_domain, self.path + path)

    def replace_segments(self, segments: Iterable[str]) -> SpiffeId:
        """:raises SpiffeError: a segment is not valid."""
        return SpiffeId(self.trust_domain, join_segments(segments))

    def append_segments(self, segments: Iterable[str]) -> SpiffeId:
        """:raises SpiffeError: a segment is not valid."""
        return SpiffeId(self.trust_domain, self.path + join_segments(segments))

    def workload(self) -> tuple[str, str] | None:
        """Namespace and service account, if the path is Kubernetes' ``/ns/NAMESPACE/sa/SERVICE-ACCOUNT``."""
        parts = self.path.split("/")
        if len(parts) == 5 and parts[1] == "ns" and parts[3] == "sa":
            return parts[2], parts[4]
        return None


def parse(text: str) -> SpiffeId:
    """Parse a complete SPIFFE ID.

    :raises SpiffeError: it is none; the message says which part is wrong.
    """
    if not text:
        raise SpiffeError("cannot be empty")
    if not text.startswith(_SCHEME):
        raise SpiffeError("scheme is missing or invalid")
    if len(text) > MAX_ID:
        raise SpiffeError(f"longer than {MAX_ID} bytes")
    name, slash, rest = text[len(_SCHEME) :].partition("/")
    check_trust_domain(name)
    path = slash + rest
    check_path(path)
    return SpiffeId(name, path)


def trust_domain(text: str) -> str:
    """The name of a trust domain, which may be given as a name or as any SPIFFE ID in it.

    :raises SpiffeError: it is neither.
    """
    if ":/" in text:
        return parse(text).trust_domain
    check_trust_domain(text)
    return text


def workload_id(domain: str, namespace: str, service_account: str) -> SpiffeId:
    """The identity of a Kubernetes workload: ``spiffe://DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT``.

    :raises SpiffeError: a part is not valid.
    """
    check_trust_domain(domain)
    return SpiffeId(domain, join_segments(("ns", namespace, "sa", service_account)))


def join_segments(segments: Iterable[str] | None) -> str:
    """A path of the segments; empty for none.

    :raises SpiffeError: a segment is not valid.
    """
    path = ""
    for segment in segments or ():
        _check_segment(segment)
        path += "/" + segment
    return path


def check_trust_domain(name: str) -> None:
    """:raises SpiffeError: ``name`` is no name of a trust domain."""
    if not name:
        raise SpiffeError("trust domain is missing")
    if len(name) > MAX_TRUST_DOMAIN:
        raise SpiffeError(f"trust domain is longer than {MAX_TRUST_DOMAIN} bytes")
    if not _TRUST_DOMAIN.fullmatch(name):
        raise SpiffeError(
            "trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores"
        )


def check_path(path: str) -> None:
    """:raises SpiffeError: ``path`` is neither empty nor a valid path."""
    if not path:
        return
    if not path.startswith("/"):
        raise SpiffeError("path must have a leading slash")
    segments = path[1:].split("/")
    if segments[-1] == "" and "" not in segments[:-1]:
        raise SpiffeError("path cannot have a trailing slash")
    for segment in segments:
        _check_segment(segment)


def _check_segment(segment: str) -> None:
    if not segment:
        raise SpiffeError("path cannot contain empty segments")
    if segment in (".", ".."):
        raise SpiffeError("path cannot contain dot segments")
    if not _SEGMENT.fullmatch(segment):
        raise SpiffeError(
            "path segment characters are limited to letters, numbers, dots, dashes, and underscores"
        )


#: Raises :class:`SpiffeError` if the peer (None: it has no SPIFFE ID) is not accepted.
Matcher = Callable[[SpiffeId | None], None]


def match_any() -> Matcher:
    """Accepts every peer, also one without an ID."""
    return lambda _peer: None


def match_one_of(expected: Sequence[SpiffeId]) -> Matcher:
    """Accepts the peers listed."""
    accepted = frozenset(expected)

    def match(peer: SpiffeId | None) -> None:
        if peer not in accepted:
            raise SpiffeError(f'unexpected ID "{peer or ""}"')

    return match


def match_id(expected: SpiffeId) -> Matcher:
    """Accepts exactly one peer."""
    return match_one_of((expected,))


def match_member_of(domain: str) -> Matcher:
    """Accepts peers of a trust domain. The empty name is what a peer without an ID is a member of."""

    def match(peer: SpiffeId | None) -> None:
        actual = peer.trust_domain if peer else ""
        if actual != domain:
            raise SpiffeError(f'unexpected trust domain "{actual}"')

    return match
