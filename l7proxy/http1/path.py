"""The normal form of a request's path, so that a route or policy sees what the application will see.

Owns what Envoy calls ``normalize_path`` and ``merge_slashes`` (RFC 3986, sections 6.2.2 and 6.2.3): escapes of unreserved
characters are decoded, a backslash is a slash, dot segments are resolved. Escaped slashes stay escaped. The query is not touched.
"""

from __future__ import annotations

import re

_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def _decode(match: re.Match[str]) -> str:
    character = chr(int(match[1], 16))
    return character if character in _UNRESERVED else match[0].upper()


def normalize(target: str, *, merge_slashes: bool = False) -> str:
    """A target in origin-form (path and query); others come back as they are."""
    if not target.startswith("/"):
        return target
    path, mark, query = target.partition("?")
    path = _ESCAPE.sub(_decode, path).replace("\\", "/")
    if "/." in path:
        path = _remove_dot_segments(path)
    if merge_slashes:
        path = re.sub("/{2,}", "/", path)
    return path + mark + query


def _remove_dot_segments(path: str) -> str:
    """RFC 3986, section 5.2.4; a path never climbs above its root."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            if kept:
                kept.pop()
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", "..") and (not kept or kept[-1]):
        kept.append("")
    return "/" + "/".join(kept)
