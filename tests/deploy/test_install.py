"""What ``mycel install`` writes, taken by a real API server: the first time, again, with definitions, and by helm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from deploy import chart, manifests
from deploy.values import load
from lab.kubernetes import ControlPlane
from tests.deploy.helm import helm

pytestmark = pytest.mark.privileged


def mycel(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def generations(server: ControlPlane, text: str) -> dict[tuple[str, str, str, str], str]:
    """The resource versions of all objects of a stream."""
    shown = server.kubectl("get", "-o", "yaml", "-f", "-", input=text)
    return {
        manifests.key(one): str(one["metadata"]["resourceVersion"]) for one in yaml.safe_load(shown)["items"]
    }


@pytest.fixture
def clean(api_server: ControlPlane) -> Iterator[ControlPlane]:
    """The server, and afterwards nothing of ours that is not in a namespace (nobody deletes namespaces there)."""
    yield api_server
    for kind in ("validatingwebhookconfiguration", "clusterrole", "clusterrolebinding"):
        api_server.kubectl("delete", kind, "-l", "app.kubernetes.io/name=mycel", "--ignore-not-found")


def test_applied_again_nothing_changes(clean: ControlPlane) -> None:
    text = mycel("install", "--namespace", "twice")
    clean.kubectl("apply", "--server-side", "-f", "-", input=text)
    before = generations(clean, text)
    clean.kubectl("apply", "--server-side", "-f", "-", input=text)
    assert generations(clean, text) == before
    assert len(before) == len(list(yaml.safe_load_all(text)))


def test_what_controllers_have_filled_in_stays(clean: ControlPlane) -> None:
    """The key, the bundle, the lease and the webhook's authority are theirs; applying again takes none of it away."""
    text = mycel("install", "--namespace", "filled")
    clean.kubectl("apply", "--server-side", "-f", "-", input=text)
    key = "c2VjcmV0"
    for kind, name, patch in (
        ("secret", "mycel-ca", f'{{"data": {{"ca.key": "{key}"}}}}'),
        ("configmap", "mycel-roots", '{"data": {"roots.pem": "PEM"}}'),
        ("lease", "mycel-controlplane", '{"spec": {"holderIdentity": "one"}}'),
    ):
        clean.kubectl("patch", kind, name, "-n", "filled", "--type=merge", "-p", patch)
    bundle = '[{"op": "add", "path": "/webhooks/0/clientConfig/caBundle", "value": "UEVN"}]'
    clean.kubectl("patch", "validatingwebhookconfiguration", "mycel", "--type=json", "-p", bundle)

    changed = mycel("install", "--namespace", "filled", "--set", "webhook.timeoutSeconds=7")
    clean.kubectl("apply", "--server-side", "-f", "-", input=changed)

    def show(*what: str) -> str:
        return clean.kubectl("get", *what, "-n", "filled", "-o", "yaml")

    assert key in show("secret", "mycel-ca")
    assert "roots.pem: PEM" in show("configmap", "mycel-roots")
    assert "holderIdentity: one" in show("lease", "mycel-controlplane")
    webhook = show("validatingwebhookconfiguration", "mycel")
    assert "timeoutSeconds: 7" in webhook
    assert "caBundle: UEVN" in webhook


def test_definitions_that_are_there_are_left_alone(clean: ControlPlane) -> None:
    """``--crds`` brings what is lacking, never over one that is there."""
    arguments = ["install", "--namespace", "defined", "--kubeconfig", str(clean.kubeconfig), "--crds"]
    mine = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "trafficsplits.split.smi-spec.io", "labels": {"mine": "yes"}},
        "spec": {
            "group": "split.smi-spec.io",
            "names": {"kind": "TrafficSplit", "plural": "trafficsplits"},
            "scope": "Namespaced",
            "versions": [
                {
                    "name": "v1alpha2",
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": {"type": "object"}},
                }
            ],
        },
    }
    already = clean.kubectl("get", "crd", "-o", "name")
    if "trafficsplits.split.smi-spec.io" not in already:
        clean.apply(mine)
    text = mycel(*arguments, "smi")
    names = {one["metadata"]["name"] for one in yaml.safe_load_all(text)}
    assert "trafficsplits.split.smi-spec.io" not in names
    clean.kubectl("apply", "--server-side", "-f", "-", input=text)
    again = {one["kind"] for one in yaml.safe_load_all(mycel(*arguments, "smi"))}
    assert "CustomResourceDefinition" not in again


def test_projects_that_are_none_are_refused(clean: ControlPlane) -> None:
    result = CliRunner().invoke(
        app, ["install", "--kubeconfig", str(clean.kubeconfig), "--crds", "istio,consul"]
    )
    assert result.exit_code == 2
    assert "consul" in result.stderr


def test_helm_installs_and_upgrades(clean: ControlPlane, tmp_path: Path) -> None:
    """The same objects, by helm's own way to the API server."""
    namespace = "by-helm"
    clean.kubectl("create", "namespace", namespace)
    options = {"home": tmp_path, "kubeconfig": clean.kubeconfig}
    helm("install", "mycel", chart.FOLDER, "-n", namespace, "--set", "controlplane.replicas=3", **options)
    helm("upgrade", "mycel", chart.FOLDER, "-n", namespace, "--set", "log.level=debug", **options)
    text = manifests.to_yaml(manifests.build(load(settings=["log.level=debug"]), namespace))
    shown = clean.kubectl("get", "-o", "yaml", "-f", "-", input=text)
    there = {manifests.key(one): one for one in yaml.safe_load(shown)["items"]}
    for one in yaml.safe_load_all(text):
        assert contains(there[manifests.key(one)], one), manifests.key(one)
    helm("uninstall", "mycel", "-n", namespace, **options)
    assert "mycel" not in clean.kubectl(
        "get", "clusterrole", "-l", "app.kubernetes.io/name=mycel", "-o", "name"
    )


def contains(there: object, wanted: object) -> bool:
    """Whether all of ``wanted`` is in what the API server made of it."""
    if isinstance(wanted, dict):
        return isinstance(there, dict) and all(
            (value in ({}, [], None) and not there.get(name)) or contains(there.get(name), value)
            for name, value in wanted.items()
        )
    if isinstance(wanted, list):
        return isinstance(there, list) and len(there) == len(wanted) and all(map(contains, there, wanted))
    return there == wanted
