"""What ``mycel check`` says of roots and rights, on a real API server. (Whole installations: tests/cluster.)"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from cli import installation
from cli.cluster import Cluster, Json
from cli.main import app
from controlplane.model.findings import Severity
from deploy import manifests, parts
from deploy.values import load
from lab.kubernetes import ControlPlane

pytestmark = pytest.mark.privileged

PAGE = Path(__file__).parents[2] / "docs/kubernetes.md"


@pytest.fixture
def cluster(api_server: ControlPlane, api_namespace: str) -> Iterator[Cluster]:
    with Cluster(api_namespace, kubeconfig=api_server.kubeconfig) as cluster:
        yield cluster


def root(days: int) -> str:
    """A certificate that ends in so many days."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")])
    ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days, hours=1)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(ends - datetime.timedelta(days=3650))
        .not_valid_after(ends)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize(
    ("days", "severity", "message"),
    [
        ([-1], Severity.ERROR, "has expired"),
        ([89], Severity.WARNING, "expires in 89 days"),
        ([89, 3000], None, ""),
        ([91], None, ""),
    ],
)
def test_a_root_that_ends_is_told_with_what_to_do(
    api_server: ControlPlane, cluster: Cluster, days: list[int], severity: Severity | None, message: str
) -> None:
    metadata = {"name": parts.ROOTS, "namespace": cluster.namespace}
    data = {"roots.pem": "".join(root(one) for one in days)}
    api_server.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    found = installation._roots(cluster)
    if severity is None:
        assert found == []
        return
    (finding,) = found
    assert finding.severity is severity
    assert message in finding.message
    section = finding.action.rpartition(", ")[2]
    assert f"\n## {section}\n" in PAGE.read_text(), "whoever is sent there finds it"


WAITING = {"reason": "CrashLoopBackOff"}
PULLING = {"reason": "ImagePullBackOff"}


@pytest.mark.parametrize(
    ("state", "last", "why", "what"),
    [
        (
            {"waiting": WAITING},
            {"terminated": {"exitCode": 3}},
            "CrashLoopBackOff, ended before with status 3",
            "logs -n {} bad --previous",
        ),
        ({"waiting": PULLING}, {}, "ImagePullBackOff", "describe pod -n {} bad"),
        ({"running": {}}, {}, "runs and is not ready", "logs -n {} bad"),
    ],
    ids=["crashes", "pulls", "runs"],
)
def test_the_pod_that_is_not_ready_is_the_one_to_look_at(
    api_server: ControlPlane, cluster: Cluster, state: Json, last: Json, why: str, what: str
) -> None:
    """Of a DaemonSet's many pods kubectl would show the log of any."""
    namespace = cluster.namespace
    built = manifests.build(load(), namespace)
    api_server.apply(
        next(o for o in built if o["kind"] == "DaemonSet" and o["metadata"]["name"] == parts.AGENT)
    )
    for name in ("a-good-one", "bad"):
        spec = {"containers": [{"name": "agent", "image": "i"}], "automountServiceAccountToken": False}
        metadata = {"name": name, "namespace": namespace, "labels": parts.selector(parts.AGENT)}
        api_server.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    container = {"name": "agent", "image": "i", "imageID": "", "ready": False, "restartCount": 1}
    container |= {"state": state, "lastState": last}
    patches: dict[str, Json] = {
        "a-good-one": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
        "bad": {"phase": "Running", "containerStatuses": [container]},
    }
    for name, status in patches.items():
        patch = json.dumps({"status": status})
        pod = ("pod", name, "-n", namespace)
        api_server.kubectl("patch", *pod, "--subresource=status", "--type=merge", "-p", patch)
    (finding,) = installation.rollout(cluster, [parts.AGENT])
    assert finding.message.endswith(f": bad: {why}")
    assert finding.action == "kubectl " + what.format(namespace)


def test_who_may_not_look_is_told_which_right_that_takes(
    api_server: ControlPlane, api_namespace: str
) -> None:
    token = api_server.kubectl("create", "token", "default", "-n", api_namespace).strip()
    config = yaml.safe_load(api_server.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    file = api_server.folder / f"{api_namespace}.kubeconfig"
    file.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, ["check", "--kubeconfig", str(file), "-n", api_namespace])
    assert result.exit_code == 2
    assert "403 Forbidden" in result.stderr
    assert "pods/proxy" in result.stderr
    assert "Name a cluster" not in result.stderr
