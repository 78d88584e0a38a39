"""The types that every source shares."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from controlplane.source.kinds import AMBIGUOUS

#: Namespace of a namespaced object whose manifest names none.
DEFAULT_NAMESPACE = "default"
#: (group, kind) of objects that live in no namespace.
_CLUSTER_SCOPED = frozenset(
    {
        ("", "Namespace"),
        ("", "Node"),
        ("", "PersistentVolume"),
        ("admissionregistration.k8s.io", "MutatingWebhookConfiguration"),
        ("admissionregistration.k8s.io", "ValidatingWebhookConfiguration"),
        ("apiextensions.k8s.io", "CustomResourceDefinition"),
        ("gateway.networking.k8s.io", "GatewayClass"),
        ("rbac.authorization.k8s.io", "ClusterRole"),
        ("rbac.authorization.k8s.io", "ClusterRoleBinding"),
    }
)


class Key(NamedTuple):
    """What an object is known by. The API version is not part of it: all versions are one object."""

    group: str
    kind: str
    namespace: str  #: empty for what lives in no namespace
    name: str

    def __str__(self) -> str:
        """``KIND NAMESPACE/NAME``; a kind of several groups as kubectl has it, ``Gateway.networking.istio.io``."""
        kind = f"{self.kind}.{self.group}" if self.kind in AMBIGUOUS and self.group else self.kind
        return f"{kind} {self.namespace}/{self.name}" if self.namespace else f"{kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Object:
    """One object as written. ``manifest`` is JSON-like and must not be changed."""

    key: Key
    manifest: Mapping[str, Any]
    file: str = ""  #: where it came from, relative to the source's root
    stand_in: bool = (
        False  #: nobody wrote it: it stands for one that is refused (:mod:`controlplane.standin`)
    )

    @property
    def spec(self) -> Mapping[str, Any]:
        return self.manifest.get("spec") or {}

    @property
    def labels(self) -> Mapping[str, str]:
        return self.manifest["metadata"].get("labels") or {}

    @property
    def annotations(self) -> Mapping[str, str]:
        return self.manifest["metadata"].get("annotations") or {}

    @property
    def age(self) -> tuple[str, str, str]:
        """Sorts objects oldest first (Istio's tie-break: creation time, then name)."""
        return (self.manifest["metadata"].get("creationTimestamp") or "", self.key.namespace, self.key.name)


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """Why an object, or a file, is not in force as written."""

    file: str
    object: str  #: ``KIND NAMESPACE/NAME``; empty if the file as a whole is meant
    field: str  #: ``spec.http[0].route``; empty if the object as a whole is meant
    reason: str
    action: str = ""
    key: Key | None = dataclasses.field(default=None, compare=False)  #: the object's, where there is one


@dataclass(frozen=True)
class State:
    """All objects in force, and all faults. A state is replaced, never changed."""

    objects: Mapping[Key, Object] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    #: objects as they are written that are refused: an older version of theirs is in force, or none
    refused: Mapping[Key, Object] = field(default_factory=dict)


#: (field, reason) of everything that is wrong with a manifest taken alone.
Validator = Callable[[dict[str, Any]], Iterable[tuple[str, str]]]


class Source(Protocol):
    """Hands out states: :meth:`load` once, then one from :meth:`changes` whenever something is different."""

    def load(self) -> State:
        """The state now. Blocking; called once, before anything else."""
        ...

    def changes(self) -> AsyncIterator[State]:
        """Every later state, as it comes; states that nobody took are skipped."""
        ...


def key_of(manifest: Mapping[str, Any]) -> Key:
    """The key of a manifest that has apiVersion, kind and metadata.name."""
    group, _, _ = manifest["apiVersion"].rpartition("/")
    kind = manifest["kind"]
    metadata = manifest["metadata"]
    cluster_wide = (group, kind) in _CLUSTER_SCOPED
    namespace = "" if cluster_wide else metadata.get("namespace") or DEFAULT_NAMESPACE
    return Key(group, kind, namespace, metadata["name"])
