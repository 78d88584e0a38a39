"""What the compiler has to say about objects: what is wrong, and what to do."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from controlplane.source import Fault, Key


class Severity(enum.IntEnum):
    """How bad it is. ERROR: something asked for is refused. WARNING: not in force as written. INFO: good to know."""

    INFO = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that somebody should know. ``object`` is ``KIND NAMESPACE/NAME``, ``field`` a path in it."""

    severity: Severity
    object: str
    field: str
    message: str
    action: str = ""
    file: str = ""
    #: the object's; None where a finding is about no object, or about something of which nobody can tell what it is
    key: Key | None = dataclasses.field(default=None, compare=False)

    def __str__(self) -> str:
        place = " ".join(p for p in (self.file, self.object, self.field) if p)
        return f"{self.severity.name.lower()}: {place}: {self.message}" + (
            f" ({self.action})" if self.action else ""
        )


class About(Protocol):
    """What a finding can be about: an object, or what was read from one."""

    @property
    def key(self) -> Key: ...

    @property
    def file(self) -> str: ...


class Findings:
    """Collects findings; each only once."""

    __slots__ = ("_all",)

    def __init__(self) -> None:
        self._all: dict[Finding, None] = {}

    def error(self, about: About, field: str, message: str, action: str = "") -> None:
        self._add(Severity.ERROR, about, field, message, action)

    def warning(self, about: About, field: str, message: str, action: str = "") -> None:
        self._add(Severity.WARNING, about, field, message, action)

    def info(self, about: About, field: str, message: str, action: str = "") -> None:
        self._add(Severity.INFO, about, field, message, action)

    def _add(self, severity: Severity, about: About, field: str, message: str, action: str) -> None:
        self._all[Finding(severity, str(about.key), field, message, action, about.file, about.key)] = None

    def all(self) -> tuple[Finding, ...]:
        """In order of collection."""
        return tuple(self._all)


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first, then by object."""
    return tuple(
        sorted(findings, key=lambda f: (-f.severity, f.object, f.field, f.message, f.action, f.file))
    )


def from_fault(fault: Fault) -> Finding:
    """A source's fault as a finding: something in a file is not in force, so it is an error."""
    return Finding(
        Severity.ERROR, fault.object, fault.field, fault.reason, fault.action, fault.file, fault.key
    )
