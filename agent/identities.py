"""Numbers for identities: kernel maps hold a u32 where everybody else holds names.

Owns the numbering of one node, of identities and of zones: a number means the same distinct (SPIFFE ID, workload name, app,
version), or zone, for as long as something carries it, across restarts of the agent, because open connections and counters
in the kernel carry it. A number is never used again for another. Writing the file is the caller's: before a new number
reaches the kernel.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from bpf.wire import IDENTITY_FIRST
from controlplane.api import Workload

_SCHEME = "spiffe://"
_LAST = 2**32 - 1
_LAST_ZONE = 2**16 - 1


class Label(msgspec.Struct, frozen=True):
    """Whom a number stands for: what verdicts and metrics need to know of a workload."""

    identity: str  #: ``spiffe://...``
    workload_name: str = "unknown"
    app: str = "unknown"
    version: str = "unknown"

    @property
    def principal(self) -> str:
        """The SPIFFE ID without its scheme, as policies write it."""
        return self.identity.removeprefix(_SCHEME)

    @property
    def namespace(self) -> str:
        parts = self.principal.split("/")
        return parts[2] if len(parts) == 5 and parts[1] == "ns" else "unknown"


class IdentitiesError(Exception):
    """The bytes are no numbering, or there are no numbers left."""


class _File(msgspec.Struct):
    next: int
    numbers: list[tuple[int, Label]]
    next_zone: int = 1
    zones: list[tuple[int, str]] = []


class Identities:
    """The numbering. ``dirty`` says that it holds what is not on disk yet; who writes it there says so."""

    def __init__(self, first: int = IDENTITY_FIRST) -> None:
        self._next = first
        self._numbers: dict[Label, int] = {}
        self._labels: dict[int, Label] = {}
        # Where numbers of identities were lost, those of zones were too, and accounts in the kernel may still have them.
        self._next_zone = 1 if first == IDENTITY_FIRST else 1 + first % 2**15
        self._zones: dict[str, int] = {}
        self._zone_names: dict[int, str] = {}
        self.dirty = False

    def __len__(self) -> int:
        return len(self._labels)

    def number(self, label: Label) -> int:
        """The number of a label; a new one if it has none.

        :raises IdentitiesError: all numbers are used up.
        """
        number = self._numbers.get(label)
        if number is None:
            if self._next > _LAST:
                raise IdentitiesError("no identity numbers left")
            number = self._next
            self._next += 1
            self._numbers[label] = number
            self._labels[number] = label
            self.dirty = True
        return number

    def zone(self, name: str) -> int:
        """The number of a zone; a new one if it has none. 0 for "", and for what comes after 65,535 of them."""
        if not name:
            return 0
        number = self._zones.get(name, 0)
        if number == 0 and self._next_zone <= _LAST_ZONE:
            number = self._next_zone
            self._next_zone += 1
            self._zones[name] = number
            self._zone_names[number] = name
            self.dirty = True
        return number

    def zone_name(self, number: int) -> str:
        """The zone of a number, "unknown" if it is nobody's."""
        return self._zone_names.get(number, "unknown")

    def find(self, workload: Workload) -> int | None:
        """A workload's number, if it has one."""
        return self._numbers.get(label_of(workload))

    def label(self, number: int) -> Label | None:
        """Whom a number stands for; None for the reserved ones and for those of no workload."""
        return self._labels.get(number)

    def unused(self, labels: Collection[Label]) -> set[int]:
        """The numbers of all other labels."""
        return {number for label, number in self._numbers.items() if label not in labels}

    def forget(self, numbers: Collection[int]) -> None:
        """Nothing carries these any more. None of them is given again."""
        for number in numbers:
            label = self._labels.pop(number, None)
            if label is not None:
                del self._numbers[label]
                self.dirty = True

    def principals(self, identities: Collection[str]) -> dict[int, str]:
        """Principal by number, of every number that was ever given to one of these SPIFFE IDs."""
        return {n: label.principal for n, label in self._labels.items() if label.identity in identities}

    def dump(self) -> bytes:
        labels = sorted(self._labels.items(), key=lambda item: item[0])
        return msgspec.json.encode(
            _File(self._next, labels, self._next_zone, sorted(self._zone_names.items()))
        )

    @classmethod
    def load(cls, data: bytes) -> Identities:
        """:raises IdentitiesError: the bytes are no numbering."""
        try:
            file = msgspec.json.decode(data, type=_File)
        except ValueError as error:  # msgspec's own, and a text that is no UTF-8
            raise IdentitiesError(str(error)) from None
        self = cls(max(file.next, IDENTITY_FIRST))
        for number, label in file.numbers:
            if not IDENTITY_FIRST <= number < self._next or number in self._labels or label in self._numbers:
                raise IdentitiesError(f"number {number} is out of place")
            self._numbers[label] = number
            self._labels[number] = label
        self._next_zone = max(file.next_zone, 1)
        for number, name in file.zones:
            if not 1 <= number < self._next_zone or number in self._zone_names or name in self._zones:
                raise IdentitiesError(f"zone number {number} is out of place")
            self._zones[name] = number
            self._zone_names[number] = name
        return self


def label_of(workload: Workload) -> Label:
    return Label(workload.identity, workload.workload_name, workload.app, workload.version)
