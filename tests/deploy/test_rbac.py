"""What each service account may do, asked of a real API server, is what docs/kubernetes.md says: no less and no more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from deploy import agent, crds, manifests, rbac
from deploy.values import load
from lab.kubernetes import ControlPlane

pytestmark = pytest.mark.privileged

NAMESPACE = "mycel-rights"
PAGE = Path(__file__).parents[2] / "docs/kubernetes.md"


class Right(NamedTuple):
    verb: str
    group: str
    resource: str
    name: str


@pytest.fixture(scope="module")
def installed(api_server: ControlPlane) -> Iterator[ControlPlane]:
    """Our accounts and roles, as installed, in a namespace that is removed with its cluster-wide objects."""
    api_server.kubectl("create", "namespace", NAMESPACE)
    kinds = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
    objects = yaml.safe_dump_all([o for o in manifests.build(load(), NAMESPACE) if o["kind"] in kinds])
    api_server.kubectl("apply", "--server-side", "-f", "-", input=objects)
    yield api_server
    api_server.kubectl("delete", "--wait=false", "-f", "-", input=objects)


def documented(account: str, where: str) -> set[Right]:
    found: set[Right] = set()
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 7 or cells[0] != account or (where == "elsewhere" and cells[1] != "cluster"):
            continue
        _, _, group, resources, names, verbs, _ = cells
        found |= {
            Right(verb, group, resource, name)
            for resource in resources.split(", ")
            for verb in verbs.split(", ")
            for name in names.split(", ")
        }
    return found


def granted(server: ControlPlane, account: str, namespace: str) -> set[Right]:
    """SelfSubjectRulesReview, as the account itself."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }
    text = server.kubectl(
        "create",
        "--validate=false",
        "-f",
        "-",
        "-o",
        "yaml",
        f"--as=system:serviceaccount:{NAMESPACE}:{account}",
        "--as-group=system:serviceaccounts",
        f"--as-group=system:serviceaccounts:{NAMESPACE}",
        "--as-group=system:authenticated",
        input=yaml.safe_dump(review),
    )
    status = yaml.safe_load(text)["status"]
    assert not status["incomplete"], status
    rules: list[dict[str, Any]] = status["resourceRules"]
    return {
        Right(verb, group, resource, name)
        for rule in rules
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames") or [""]
    }


@pytest.mark.parametrize("account", ["mycel-controlplane", "mycel-agent", "mycel-nodeproxy", "mycel-l7proxy"])
@pytest.mark.parametrize("where", ["own", "elsewhere"])
def test_rights_are_those_of_the_table(installed: ControlPlane, account: str, where: str) -> None:
    namespace = NAMESPACE if where == "own" else "default"
    # What every account may do (to ask who it is) is not ours to give.
    everybody = granted(installed, "nobody-at-all", namespace)
    ours = granted(installed, account, namespace) - everybody
    wanted = documented(account, where)
    assert ours - wanted == set(), "granted and not in the table"
    assert wanted - ours == set(), "in the table and not granted"
    if account == "mycel-controlplane":
        assert len(wanted) > 100
    if account.endswith("proxy"):
        assert not wanted


def test_status_is_written_where_a_definition_has_one() -> None:
    """Of what we bring, and by which other installations are made too."""
    without = {
        crd["metadata"]["name"]
        for crd in crds.definitions(crds.PROJECTS)
        if not any("status" in (version.get("subresources") or {}) for version in crd["spec"]["versions"])
    }
    assert without == rbac.WITHOUT_STATUS


def test_the_agents_capabilities_are_those_of_the_page() -> None:
    rows = dict(re.findall(r"^\| ([A-Z_]+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE))
    assert rows == agent.CAPABILITIES


def allowed(server: ControlPlane, account: str, *question: str) -> bool:
    answer = server.kubectl(
        "auth", "can-i", *question, f"--as=system:serviceaccount:{NAMESPACE}:{account}", check=False
    )
    return answer.strip().splitlines()[-1] == "yes"


@pytest.mark.parametrize(
    ("account", "question"),
    [
        ("mycel-controlplane", ["get", "secrets/other", "-n", NAMESPACE]),
        ("mycel-controlplane", ["list", "secrets", "-n", NAMESPACE]),
        ("mycel-controlplane", ["get", "secrets/mycel-ca", "-n", "default"]),
        ("mycel-controlplane", ["create", "secrets", "-n", NAMESPACE]),
        ("mycel-controlplane", ["delete", "secrets/mycel-ca", "-n", NAMESPACE]),
        ("mycel-controlplane", ["update", "virtualservices.networking.istio.io", "-A"]),
        ("mycel-controlplane", ["create", "pods", "-n", NAMESPACE]),
        ("mycel-agent", ["get", "secrets/mycel-ca", "-n", NAMESPACE]),
        ("mycel-agent", ["delete", "daemonsets.apps/mycel-agent", "-n", NAMESPACE]),
        ("mycel-agent", ["list", "pods", "-A"]),
        ("mycel-nodeproxy", ["get", "secrets/mycel-ca", "-n", NAMESPACE]),
        ("mycel-l7proxy", ["get", "configmaps/mycel-roots", "-n", NAMESPACE]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_would_be_too_much_is_refused(
    installed: ControlPlane, account: str, question: list[str]
) -> None:
    assert not allowed(installed, account, *question)


def test_who_asks_is_answered_yes_where_the_table_says_so(installed: ControlPlane) -> None:
    """So that a "no" of the others means something."""
    assert allowed(installed, "mycel-controlplane", "get", "secrets/mycel-ca", "-n", NAMESPACE)
    assert allowed(installed, "mycel-agent", "get", "daemonsets.apps/mycel-agent", "-n", NAMESPACE)
