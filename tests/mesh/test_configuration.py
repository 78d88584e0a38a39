"""Bad files: named with file, object, field and reason; the rest is in force, and so is what was good before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import Lab, Pod
from tests.mesh.helpers import (
    ECHO,
    authorization_policy,
    echo_server,
    echoes,
    eventually,
    peer_authentication,
    rule,
)

pytestmark = pytest.mark.privileged

NAMESPACE = "config"


@pytest.fixture(scope="module")
def server(lab: Lab) -> Pod:
    lab.namespace(NAMESPACE)
    return echo_server(lab, "server", node="node1", namespace=NAMESPACE)


@pytest.fixture(scope="module")
def client(lab: Lab, server: Pod) -> Pod:
    return lab.pod("client", node="node2", namespace=NAMESPACE, service_account="client")


@pytest.fixture(autouse=True)
def no_files(lab: Lab) -> Iterator[None]:
    yield
    for path in lab.cluster.policies.glob("config-*"):
        path.unlink()
    lab.settle()


def said(lab: Lab) -> str:
    return lab.mycel("check", check=False).stdout


def deny(lab: Lab) -> None:
    lab.apply(
        authorization_policy(
            "deny", NAMESPACE, action="DENY", rules=[rule(principals=[f"{NAMESPACE}/client"])]
        ),
        name="config-deny.yaml",
    )
    lab.settle()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("a: [unclosed", ["config-bad.yaml"], id="no-yaml"),
        pytest.param(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: bad, namespace: config}\n"
            "spec: {action: PERHAPS, selector: {matchLabels: {app: nobody}}}\n",
            ["config-bad.yaml", "bad", "action", "PERHAPS"],
            id="bad-value",
        ),
        pytest.param(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: bad, namespace: config}\n"
            "spec: {rules: 7, selector: {matchLabels: {app: nobody}}}\n",
            ["config-bad.yaml", "bad", "rules"],
            id="bad-type",
        ),
    ],
)
def test_bad_file_is_named_and_the_rest_works(
    lab: Lab, server: Pod, client: Pod, text: str, words: list[str]
):
    deny(lab)
    lab.apply(text, name="config-bad.yaml")
    lab.settle()
    assert eventually(lambda: all(word in said(lab) for word in words)), said(lab)
    assert echoes(client, server.address, ECHO, timeout=3) != ""
    # Other files go on to be read.
    lab.withdraw("config-deny.yaml")
    lab.settle()
    assert echoes(client, server.address, ECHO) == ""
    lab.withdraw("config-bad.yaml")
    lab.settle()
    assert eventually(lambda: "config-bad.yaml" not in said(lab))


def test_a_bad_policy_that_never_was_good_refuses_what_it_selects(lab: Lab, server: Pod, client: Pod):
    assert echoes(client, server.address, ECHO) == ""
    broken = authorization_policy("never", NAMESPACE, action="DENI", selector={"app": "server"}, rules=[])
    lab.apply(broken, name="config-never.yaml")
    lab.settle()
    assert echoes(client, server.address, ECHO, timeout=3) != ""
    assert eventually(lambda: "no version of it was ever good" in said(lab))
    lab.withdraw("config-never.yaml")
    lab.settle()
    assert echoes(client, server.address, ECHO) == ""


def test_last_good_version_of_a_spoilt_object_stays(lab: Lab, server: Pod, client: Pod):
    deny(lab)
    assert echoes(client, server.address, ECHO, timeout=3) != ""
    broken = authorization_policy("deny", NAMESPACE, action="PERHAPS", rules=[])
    lab.apply(broken, name="config-deny.yaml")
    lab.settle()
    assert eventually(lambda: "PERHAPS" in said(lab))
    assert echoes(client, server.address, ECHO, timeout=3) != ""
    # Unreadable is no withdrawal either.
    lab.apply("{{{", name="config-deny.yaml")
    lab.settle()
    assert eventually(lambda: "config-deny.yaml" in said(lab))
    assert echoes(client, server.address, ECHO, timeout=3) != ""
    lab.withdraw("config-deny.yaml")
    lab.settle()
    assert echoes(client, server.address, ECHO) == ""


def test_two_objects_of_one_name_are_an_error_that_names_both_files(lab: Lab, server: Pod):
    for file in ("config-one.yaml", "config-two.yaml"):
        lab.apply(peer_authentication(NAMESPACE, "PERMISSIVE"), name=file)
    lab.settle()
    assert eventually(lambda: "config-one.yaml" in said(lab) and "config-two.yaml" in said(lab)), said(lab)


def test_check_is_content_with_a_good_mesh(lab: Lab, server: Pod):
    done = lab.mycel("check", check=False)
    assert done.returncode == 0, done.stdout


def test_policy_is_in_force_after_a_storm_of_writes(lab: Lab, server: Pod, client: Pod):
    for number in range(30):
        action = "DENY" if number % 2 else "ALLOW"
        lab.apply(
            authorization_policy("storm", NAMESPACE, action=action, rules=[{}]), name="config-storm.yaml"
        )
    lab.settle()
    assert echoes(client, server.address, ECHO, timeout=3) != ""
    lab.apply(authorization_policy("storm", NAMESPACE, rules=[{}]), name="config-storm.yaml")
    lab.settle()
    assert echoes(client, server.address, ECHO) == ""
