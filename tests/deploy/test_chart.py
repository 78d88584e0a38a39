"""The Helm chart gives what ``mycel install`` gives, object by object, whatever the values."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli import install
from deploy import chart, manifests
from deploy.values import Values, load
from tests.deploy.helm import HelmError, helm, rendered

#: As many values as there are, none at its default.
OTHER: dict[str, Any] = {
    "image": {
        "repository": "images.example:5000/mesh%team",
        "tag": "9.8.7",
        "pullPolicy": "Always",
        "pullSecrets": [{"name": "puller"}, {"name": "other"}],
    },
    "trustDomain": "prod.example",
    "clusterDomain": "cluster.example",
    "outside": ["kube-system", "storage", "a-b"],
    "revokeAfter": "never",
    "log": {"level": 'info,agent.cni:debug"', "format": "text"},
    "controlplane": {
        "replicas": 3,
        "priorityClassName": "high",
        "resources": {"requests": {"cpu": "2", "memory": "1G"}, "limits": {"memory": "3000000000"}},
        "nodeSelector": {"kubernetes.io/os": "linux", "zone": "a: {b}"},
        "tolerations": [{"key": "k", "operator": "Equal", "value": "true", "effect": "NoSchedule"}],
    },
    "agent": {
        "flowLog": "-",
        "splice": "disabled",
        "priorityClassName": "higher",
        "resources": {"requests": {"cpu": "1m", "memory": "1Mi"}, "limits": {"memory": "2Gi"}},
        "maxUnavailable": 3,
        "mapSizes": ["pods=2048", "events=524288"],
    },
    "nodeproxy": {"drainSeconds": 600, "graceSeconds": 3600, "priorityClassName": "p"},
    "l7proxy": {"drainSeconds": 1, "graceSeconds": 2, "priorityClassName": ""},
    "cni": {"binDir": "/var/lib/cni/bin", "confDir": "/etc/kubernetes/cni/net.d"},
    "node": {"runDir": "/run/m", "stateDir": "/data/m", "bpfDir": "/bpf"},
    "webhook": {"failurePolicy": "Fail", "timeoutSeconds": 30},
}


def by_key(objects: list[dict[str, Any]]) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    found = {manifests.key(one): one for one in objects}
    assert len(found) == len(objects)
    return found


def test_committed_chart_is_the_one_that_is_written() -> None:
    stale = chart.Chart().stale()
    assert not stale, f"run: python -m deploy.chart; not as it is to be: {stale}"


@pytest.mark.parametrize("values", [{}, OTHER], ids=["defaults", "other"])
@pytest.mark.parametrize("namespace", ["mycel-system", "mesh"])
def test_helm_renders_what_install_writes(tmp_path: Path, values: dict[str, Any], namespace: str) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    of_helm = by_key(rendered("--include-crds", "--values", file, home=tmp_path, namespace=namespace))
    text = manifests.to_yaml(install.objects(load([file]), namespace))
    of_install = by_key(list(yaml.safe_load_all(text)))

    # Helm needs the namespace before it installs into it.
    del of_install["", "Namespace", "", namespace]
    assert of_helm.keys() == of_install.keys()
    for key, wanted in of_install.items():
        assert of_helm[key] == wanted, key


def test_every_value_changes_something(tmp_path: Path) -> None:
    """A value that nothing reads would be a promise that is not kept; and OTHER has to have them all."""
    before = manifests.build(load(), "mesh")
    leaves = list(_leaves(yaml.safe_load(chart.Chart().files["values.yaml"])))
    assert {path for path, _ in leaves} >= {path for path, _ in _leaves(OTHER)}
    for path, _ in leaves:
        value: Any = OTHER
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:  # resources of the proxies: the same code as the others'
            assert path[0] in ("nodeproxy", "l7proxy") and path[1] == "resources", path
            continue
        settings = [".".join(path) + "=" + yaml.safe_dump(value, default_flow_style=True).partition("\n")[0]]
        if path[1:] == ("drainSeconds",):
            settings.append(f"{path[0]}.graceSeconds=3600")
        if path[1:] == ("graceSeconds",):
            settings.append(f"{path[0]}.drainSeconds=1")
        assert manifests.build(load(settings=settings), "mesh") != before, path


def _leaves(node: dict[str, Any], path: tuple[str, ...] = ()) -> Any:
    for name, value in node.items():
        if isinstance(value, dict) and value and name != "nodeSelector":
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def test_lint(tmp_path: Path) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", chart.FOLDER, home=tmp_path)


@pytest.mark.parametrize(
    "setting",
    ["agnt.maxUnavailable=1", "controlplane.replicas=0", "cni.binDir=opt/cni", "webhook.failurePolicy=Maybe"],
)
def test_helm_refuses_what_install_refuses(tmp_path: Path, setting: str) -> None:
    with pytest.raises(HelmError, match=setting.partition(".")[2].partition("=")[0] + "|agnt"):
        rendered("--set", setting, home=tmp_path, namespace="mesh")


def test_a_builder_that_computes_with_a_value_is_refused() -> None:
    values = chart._placeholders(Values, ".Values")
    with pytest.raises(TypeError, match="drainSeconds: no arithmetic"):
        values.nodeproxy.drain_seconds + 15


def test_pods_keep_to_nodes_with_linux() -> None:
    """The daemons tolerate every taint, also the one that keeps others off Windows nodes."""
    templates = [
        one["spec"]["template"]["spec"]
        for one in manifests.build(load(settings=["controlplane.nodeSelector={zone: a}"]), "mesh")
        if one["kind"] in ("Deployment", "DaemonSet")
    ]
    assert len(templates) == 4
    assert all(template["nodeSelector"]["kubernetes.io/os"] == "linux" for template in templates)


def test_order_names_what_is_referred_to_first() -> None:
    kinds = [one["kind"] for one in install.objects(load(), "mesh")]
    order = ["Namespace", "ServiceAccount", "ClusterRole", "Secret", "Deployment", "DaemonSet"]
    assert all(kinds.index(a) < kinds.index(b) for a, b in itertools.pairwise(order))
    assert kinds[-1] == "ValidatingWebhookConfiguration"


def test_what_surges_waits_in_its_probe() -> None:
    """Of a DaemonSet with both, Kubernetes' controller may forget to look when a new pod has been ready for long enough."""
    sets = [one for one in manifests.build(Values(), "mycel-system") if one["kind"] == "DaemonSet"]
    surging = [one["spec"] for one in sets if one["spec"]["updateStrategy"]["rollingUpdate"]["maxSurge"]]
    assert len(surging) == 2
    for spec in surging:
        (container,) = spec["template"]["spec"]["containers"]
        assert "minReadySeconds" not in spec
        assert container["readinessProbe"]["successThreshold"] > 1
