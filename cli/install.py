"""``mycel install``: the objects of an installation as YAML, for ``kubectl apply --server-side -f -``."""

from __future__ import annotations

from deploy import manifests
from deploy.parts import Json
from deploy.values import Values


def objects(values: Values, namespace: str) -> list[Json]:
    """Everything of an installation in apply order, the namespace first and our own definitions next."""
    return [
        manifests.namespace_object(values, namespace),
        *manifests.own_crds(),
        *manifests.build(values, namespace),
    ]
