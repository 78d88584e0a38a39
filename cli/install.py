"""``mycel install``: the objects of an installation as YAML, for ``kubectl apply --server-side -f -``."""

from __future__ import annotations

from collections.abc import Iterable

from deploy import manifests
from deploy.parts import Json
from deploy.values import Values


def objects(values: Values, namespace: str, definitions: Iterable[Json] = ()) -> list[Json]:
    """Everything of an installation in apply order, the namespace first and definitions next.

    :param definitions: of other projects, which the cluster lacks.
    """
    return [
        manifests.namespace_object(values, namespace),
        *manifests.own_crds(),
        *definitions,
        *manifests.build(values, namespace),
    ]
