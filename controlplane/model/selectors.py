"""Label selectors as Kubernetes has them (meta/v1 LabelSelector), and their one text by which equal ones are told."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from controlplane.schema.core import LABEL_KEY

_KEY = re.compile(LABEL_KEY)


class Requirement(NamedTuple):
    """One condition on one label. ``values`` are sorted, and empty for Exists and DoesNotExist."""

    key: str
    operator: str
    values: tuple[str, ...]

    def holds(self, labels: Mapping[str, str]) -> bool:
        match self.operator:
            case "In":
                return labels.get(self.key) in self.values
            case "NotIn":
                # Also where there is no such label at all.
                return labels.get(self.key) not in self.values
            case "Exists":
                return self.key in labels
            case _:
                return self.key not in labels

    def __str__(self) -> str:
        """As kubectl writes it."""
        match self.operator:
            case "In" if len(self.values) == 1:
                return f"{self.key}={self.values[0]}"
            case "In":
                return f"{self.key} in ({','.join(self.values)})"
            case "NotIn":
                return f"{self.key} notin ({','.join(self.values)})"
            case "Exists":
                return self.key
            case _:
                return f"!{self.key}"


class LabelSelector(NamedTuple):
    """All requirements have to hold; none selects everything. Sorted, so that equal ones are equal."""

    requirements: tuple[Requirement, ...] = ()

    @classmethod
    def read(cls, written: Mapping[str, Any] | None) -> LabelSelector:
        """Of one that :func:`validate` accepts; None, as one without conditions, selects everything."""
        written = written or {}
        found = {Requirement(k, "In", (v,)) for k, v in (written.get("matchLabels") or {}).items()}
        for item in written.get("matchExpressions") or ():
            values = tuple(sorted(set(item.get("values") or ())))
            found.add(Requirement(item["key"], item["operator"], values))
        return cls(tuple(sorted(found)))

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(r.holds(labels) for r in self.requirements)

    def __str__(self) -> str:
        return ",".join(map(str, self.requirements)) or "*"


class SelectorIndex(NamedTuple):
    """Keys by their selectors. What a pod is compared with is what asks for one of its labels, not all there are."""

    by_label: Mapping[tuple[str, str], tuple[tuple[str, LabelSelector], ...]]
    others: tuple[tuple[str, LabelSelector], ...]  #: those that ask for no label with a certain value

    @classmethod
    def of(cls, items: Iterable[tuple[str, LabelSelector]]) -> SelectorIndex:
        by_label: dict[tuple[str, str], tuple[tuple[str, LabelSelector], ...]] = {}
        others = []
        for item in sorted(items):
            wanted = [
                (r.key, r.values[0])
                for r in item[1].requirements
                if r.operator == "In" and len(r.values) == 1
            ]
            if wanted:
                by_label[wanted[0]] = (*by_label.get(wanted[0], ()), item)
            else:
                others.append(item)
        return cls(by_label, tuple(others))

    def matching(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        """The keys whose selectors match, sorted."""
        found = [key for key, selector in self.others if selector.matches(labels)]
        for pair in labels.items():
            found += [key for key, selector in self.by_label.get(pair, ()) if selector.matches(labels)]
        return tuple(sorted(found))


def validate(written: Mapping[str, Any] | None, path: str) -> Iterator[tuple[str, str]]:
    """(field, reason) of what is wrong with one that its schema accepts."""
    for key in (written or {}).get("matchLabels") or ():
        if not _KEY.fullmatch(key):
            yield f"{path}.matchLabels", f"{key!r} is no name of a label"
    for i, item in enumerate((written or {}).get("matchExpressions") or ()):
        values: Iterable[str] = item.get("values") or ()
        if item["operator"] in ("In", "NotIn") and not values:
            yield f"{path}.matchExpressions[{i}].values", f"{item['operator']} needs at least one value"
        if item["operator"] in ("Exists", "DoesNotExist") and values:
            yield f"{path}.matchExpressions[{i}].values", f"{item['operator']} has no values"
