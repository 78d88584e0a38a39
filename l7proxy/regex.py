"""Regular expressions of configuration: RE2, as in Envoy, whose time is linear in the text.

Python's own would try again and again: one pattern of one namespace could keep every request of a node waiting.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import re2

_OPTIONS = re2.Options()
_OPTIONS.log_errors = False


class RegexError(ValueError):
    """Not RE2's syntax, or a substitution that names no group; the text says which."""


class Pattern:
    """A pattern, in the syntax of https://github.com/google/re2/wiki/Syntax ."""

    __slots__ = ("_pattern",)

    def __init__(self, text: str) -> None:
        """:raises RegexError: it is none."""
        try:
            self._pattern = re2.compile(text, _OPTIONS)
        except re2.error as error:
            reason = error.args[0] if error.args else ""
            raise RegexError(reason.decode() if isinstance(reason, bytes) else str(reason)) from None

    def matches(self, text: str) -> bool:
        """Whether it matches all of the text."""
        return self._pattern.fullmatch(text) is not None

    def replace(self, text: str, by: Callable[[Any], str]) -> str:
        """The text with each match replaced by what ``by`` gives for it (``group(number)``: a group, or None)."""
        replaced: str = self._pattern.sub(by, text)
        return replaced

    @property
    def groups(self) -> int:
        return int(self._pattern.groups)


class Rewrite(NamedTuple):
    """Every match of a pattern is replaced."""

    pattern: Pattern
    #: Pieces of text and numbers of groups, in turn.
    substitution: tuple[str | int, ...]

    @classmethod
    def of(cls, pattern: Pattern, substitution: str) -> Rewrite:
        r"""Read a substitution.

        :param substitution: with ``\\0`` to ``\\9`` for groups and a doubled backslash for one.
        :raises RegexError: another escape, or a group that the pattern lacks.
        """
        pieces: list[str | int] = []
        for literal, escaped in re.findall(r"([^\\]+)|\\(.?)", substitution, re.DOTALL):
            if literal or escaped == "\\":
                pieces.append(literal or escaped)
            elif escaped.isdigit() and int(escaped) <= pattern.groups:
                pieces.append(int(escaped))
            else:
                raise RegexError(f"no group or escape \\{escaped}")
        return cls(pattern, tuple(pieces))

    def apply(self, text: str) -> str:
        pieces = self.substitution
        return self.pattern.replace(
            text, lambda m: "".join(p if isinstance(p, str) else m.group(p) or "" for p in pieces)
        )
