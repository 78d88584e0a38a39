"""Write ``istio.json`` from Istio's CustomResourceDefinitions (a maintainer's tool, not used at run time).

    python -m controlplane.schema.extract CRDS.yaml > controlplane/schema/istio.json

Kept: the structural schema of ``spec`` and ``status`` with its CEL rules. Dropped: descriptions, printer columns and
what else only an API server needs. Every served version of a kind has one schema upstream; the tool refuses to go on when
that changes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

_NOTE = (
    "Derived from the CustomResourceDefinitions of github.com/istio/api, Copyright Istio Authors, Apache License 2.0; "
    "descriptions removed, one schema per kind."
)


def compact(node: Any, names: bool = False) -> Any:
    """A schema node without its description; ``names``: the node's keys are names of properties."""
    if isinstance(node, list):
        return [compact(n) for n in node]
    if not isinstance(node, dict):
        return node
    return {k: compact(v, names=k == "properties") for k, v in node.items() if names or k != "description"}


def main(path: str) -> None:
    kinds: dict[str, Any] = {}
    for crd in yaml.load_all(Path(path).read_text("utf-8"), yaml.CSafeLoader):
        spec = crd["spec"]
        schemas = [compact(v["schema"]["openAPIV3Schema"]) for v in spec["versions"]]
        if any(s != schemas[0] for s in schemas):
            raise SystemExit(f"{crd['metadata']['name']}: its versions have different schemas")
        kinds[f"{spec['group']}/{spec['names']['kind']}"] = {
            "versions": [v["name"] for v in spec["versions"]],
            "schema": schemas[0],
        }
    out = ['{"": ' + json.dumps(_NOTE)]
    out += [
        json.dumps(k) + ": " + json.dumps(v, sort_keys=True, separators=(",", ":"))
        for k, v in sorted(kinds.items())
    ]
    sys.stdout.write(",\n".join(out) + "}\n")


if __name__ == "__main__":
    main(sys.argv[1])
