"""Write the definitions of this folder from those of the projects that they are of (a maintainer's tool).

    python -m deploy.crds.extract istio FILE...

One file per definition, as upstream has it: descriptions, rules, columns, subresources. Changed are only the versions served,
where users still have objects of versions that upstream has taken out of service; see ``README.md``.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import yaml

_HERE = Path(__file__).parent
_NOTES = {
    "istio": "From github.com/istio/api. Copyright Istio Authors, Apache License 2.0.",
    "gateway-api": "From github.com/kubernetes-sigs/gateway-api. Copyright The Kubernetes Authors, Apache License 2.0.",
    "linkerd": "From github.com/linkerd/linkerd2. Copyright the Linkerd Authors, Apache License 2.0.",
    "smi": "From github.com/servicemeshinterface/smi-sdk-go. Copyright the SMI Authors, Apache License 2.0.",
}


def changed(project: str, crd: dict[str, Any]) -> dict[str, Any]:
    """The definition as we install it."""
    crd = copy.deepcopy(crd)
    versions = crd["spec"]["versions"]
    if crd["metadata"]["name"] == "trafficsplits.split.smi-spec.io":
        versions.append(_first_traffic_split(versions[-1]))
    if project in ("smi", "gateway-api"):
        for version in versions:
            version["served"] = True
    if project == "smi" and len(versions) > 1:
        for version in versions:
            # Older versions had their fields beside `spec`, not in it. Nobody converts: what is stored is what was written,
            # and must not lose those fields when it is read in the version of the store.
            version["schema"]["openAPIV3Schema"]["x-kubernetes-preserve-unknown-fields"] = True
    return crd


def _first_traffic_split(second: dict[str, Any]) -> dict[str, Any]:
    """v1alpha1, which upstream's file does not list: as v1alpha2, but weights are quantities (``500m``, ``1``)."""
    result = copy.deepcopy(second)
    assert result["name"] == "v1alpha2"
    result["name"] = "v1alpha1"
    schema = result["schema"]["openAPIV3Schema"]
    weight = schema["properties"]["spec"]["properties"]["backends"]["items"]["properties"]["weight"]
    del weight["type"]
    weight |= {
        "x-kubernetes-int-or-string": True,
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "pattern": r"^[+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(([numkMGTPE]|[KMGTPE]i)|[eE][-+]?[0-9]+)?$",
    }
    return result


def main(project: str, *files: str) -> None:
    folder = _HERE / project
    folder.mkdir(exist_ok=True)
    for file in files:
        for document in yaml.load_all(Path(file).read_text("utf-8"), yaml.CSafeLoader):
            if not document or document["kind"] != "CustomResourceDefinition":
                continue
            crd = changed(project, document)
            text = yaml.dump(crd, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True, width=4096)
            (folder / f"{crd['metadata']['name']}.yaml").write_text(f"# {_NOTES[project]}\n{text}", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
