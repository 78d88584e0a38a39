"""A verdict for every policy object: refused, not compiled, accepted, or programmed on every node concerned.

Owns the judgement; it is told who has acknowledged what. An object that was programmed once stays so until its content changes: a
node that joins takes everything before it carries anything.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from controlplane.model.findings import Finding, Severity
from controlplane.source import Key, Object
from controlplane.status.kinds import is_compiled, is_policy
from controlplane.status.programming import Content, Programming

#: (node, component): one of our processes on a node.
Member = tuple[str, str]
_SHOWN = 5
_NEVER = 1 << 62


class Outcome(enum.Enum):
    """What has become of an object."""

    REFUSED = "refused"  #: it is wrong: not in force as written
    NOT_COMPILED = "not compiled"  #: it is read, and nothing is made of it yet
    ACCEPTED = "accepted"  #: in force here; not every node has it
    PROGRAMMED = "programmed"  #: every node concerned has acknowledged it


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reason`` is CamelCase as conditions have it; ``message`` is for people."""

    key: Key
    api_version: str
    id: str  #: the UID; without one (a folder) the key
    generation: int | None
    digest: str
    outcome: Outcome
    reason: str
    message: str
    waiting: str = ""  #: for whom an accepted object waits
    in_force: bool = True  #: False: no version of the object is


@dataclass(frozen=True, slots=True)
class Replica:
    """What another controller says. ``sequences`` and ``since`` are in its own count."""

    name: str
    clients: Mapping[Member, int]  #: the snapshot that each of its clients has whole
    contents: Mapping[str, tuple[str, int]]  #: by id: digest, and since when it is in force there
    refusals: Mapping[Member, str]


@dataclass(frozen=True, slots=True)
class Holding:
    """What this controller's own clients have: the same, in our count."""

    clients: Mapping[Member, int]
    refusals: Mapping[Member, str]


class Board:
    """The verdicts of now."""

    def __init__(self, programming: Programming) -> None:
        self._programming = programming
        self._programmed: dict[str, str] = {}  #: by id: the digest that was
        self.verdicts: Mapping[Key, Verdict] = {}

    def unsettled(self) -> tuple[str, ...]:
        """Ids of the objects that may become programmed, and are not."""
        return tuple(
            c.id
            for key, c in self._programming.contents.items()
            if is_compiled(key.group, key.kind) and self._programmed.get(c.id) != c.digest
        )

    def judge(
        self,
        findings: Iterable[Finding],
        refused: Mapping[Key, Object],
        own: Holding,
        expected: Iterable[Member],
        replicas: Sequence[Replica],
    ) -> bool:
        """Judge all objects anew; True if one waits for others.

        ``refused``: objects as they are written, of which an older version is in force or none. ``expected``: our
        processes that should be connected somewhere.
        """
        by_object: dict[Key, list[Finding]] = {}
        for finding in findings:
            if finding.key is not None:
                by_object.setdefault(finding.key, []).append(finding)
        acknowledged = _Acknowledged(own, expected, replicas)
        verdicts: dict[Key, Verdict] = {}
        contents = self._programming.contents
        waiting = False
        for key in [*contents, *(k for k in refused if k not in contents and is_policy(k.group, k.kind))]:
            verdict = self._judge(
                key, contents.get(key), refused.get(key), by_object.get(key, ()), acknowledged
            )
            verdicts[key] = verdict
            waiting = waiting or verdict.outcome is Outcome.ACCEPTED
        ids = {v.id for v in verdicts.values()}
        self._programmed = {i: d for i, d in self._programmed.items() if i in ids}
        self.verdicts = verdicts
        return waiting

    def _judge(
        self,
        key: Key,
        content: Content | None,
        refused: Object | None,
        findings: Sequence[Finding],
        acknowledged: _Acknowledged,
    ) -> Verdict:
        about = refused or (content.object if content else None)
        assert about is not None
        metadata = about.manifest["metadata"]
        generation = metadata.get("generation")

        def verdict(outcome: Outcome, reason: str, message: str, waiting: str = "") -> Verdict:
            return Verdict(
                key,
                about.manifest["apiVersion"],
                metadata.get("uid") or str(key),
                generation if isinstance(generation, int) else None,
                content.digest if content else "",
                outcome,
                reason,
                message[:1024],
                waiting,
                content is not None and not content.object.stand_in,
            )

        errors = [f for f in findings if f.severity is Severity.ERROR]
        if errors or refused is not None:
            text = "; ".join(_say(f) for f in errors) or "it does not fit its schema"
            if refused is not None and content is not None and not content.object.stand_in:
                text += " (the last good version stays in force)"
            return verdict(Outcome.REFUSED, "Invalid", text)
        assert content is not None
        if not is_compiled(key.group, key.kind):
            return verdict(
                Outcome.NOT_COMPILED, "NotCompiled", f"{key.kind} is read, and nothing is made of it yet"
            )
        warnings = "; ".join(_say(f) for f in findings if f.severity is Severity.WARNING)
        reason = "PartlyInForce" if warnings else "Accepted"
        if self._programmed.get(content.id) == content.digest:
            return verdict(Outcome.PROGRAMMED, reason, warnings)
        missing = acknowledged.missing(content)
        if not missing:
            self._programmed[content.id] = content.digest
            return verdict(Outcome.PROGRAMMED, reason, warnings)
        return verdict(Outcome.ACCEPTED, reason, warnings, missing)


class _Acknowledged:
    """Who has what, prepared so that most objects are judged by one comparison."""

    def __init__(self, own: Holding, expected: Iterable[Member], replicas: Sequence[Replica]) -> None:
        self._own = own
        self._replicas = replicas
        connected = set(own.clients).union(*(r.clients for r in replicas))
        absent = sorted(set(expected) - connected)
        self._absent_text = [f"{node} {component} (not connected)" for node, component in absent]
        self._known: dict[int, list[str]] = {}  #: by since: who has not got that far
        self._known_elsewhere: dict[tuple[int, int], list[str]] = {}
        self._floor = min(own.clients.values(), default=None)
        self._floors = [min(r.clients.values(), default=None) for r in replicas]

    def missing(self, content: Content) -> str:
        """Who has not acknowledged a content, as text; empty if all have."""
        late = self._absent_text + self._own_late(content.since)
        for number, replica in enumerate(self._replicas):
            digest, since = replica.contents.get(content.id, ("", 0))
            # What it has not, its clients have not.
            late += self._replica_late(number, since if digest == content.digest else _NEVER)
        if not late:
            return ""
        more = f" and {len(late) - _SHOWN} more" if len(late) > _SHOWN else ""
        return ", ".join(late[:_SHOWN]) + more

    def _own_late(self, since: int) -> list[str]:
        if self._floor is None or self._floor >= since:
            return []
        if since not in self._known:
            self._known[since] = _late(self._own.clients, since, self._own.refusals)
        return self._known[since]

    def _replica_late(self, number: int, since: int) -> list[str]:
        floor, replica = self._floors[number], self._replicas[number]
        if floor is None or floor >= since:
            return []
        if (number, since) not in self._known_elsewhere:
            self._known_elsewhere[number, since] = _late(replica.clients, since, replica.refusals)
        return self._known_elsewhere[number, since]


def _late(clients: Mapping[Member, int], since: int, refusals: Mapping[Member, str]) -> list[str]:
    result = []
    for member in sorted(m for m, sequence in clients.items() if sequence < since):
        why = f" (refuses {refusals[member]})" if member in refusals else ""
        result.append(" ".join(member) + why)
    return result


def _say(finding: Finding) -> str:
    text = f"{finding.field}: {finding.message}" if finding.field else finding.message
    return f"{text} ({finding.action})" if finding.action else text
