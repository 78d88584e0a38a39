"""What the compiler has to say about objects: what is wrong, and what to do."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from controlplane.source import Fault, Object


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

    def __str__(self) -> str:
        place = " ".join(p for p in (self.file, self.object, self.field) if p)
        return f"{self.severity.name.lower()}: {place}: {self.message}" + (
            f" ({self.action})" if self.action else ""
        )


@dataclass
class Findings:
    """Collects findings; each only once."""

    _all: dict[Finding, None] = field(default_factory=dict)

    def error(self, about: Object, field: str, message: str, action: str = "") -> None:
        self._add(Severity.ERROR, about, field, message, action)

    def warning(self, about: Object, field: str, message: str, action: str = "") -> None:
        self._add(Severity.WARNING, about, field, message, action)

    def info(self, about: Object, field: str, message: str, action: str = "") -> None:
        self._add(Severity.INFO, about, field, message, action)

    def _add(self, severity: Severity, about: Object, field: str, message: str, action: str) -> None:
        self._all[Finding(severity, str(about.key), field, message, action, about.file)] = None

    def sorted(self) -> tuple[Finding, ...]:
        """The worst first, then by object."""
        return tuple(
            sorted(self._all, key=lambda f: (-f.severity, f.object, f.field, f.message, f.action, f.file))
        )


def from_fault(fault: Fault) -> Finding:
    """A source's fault as a finding: something in a file is not in force, so it is an error."""
    return Finding(Severity.ERROR, fault.object, fault.field, fault.reason, fault.action, fault.file)
