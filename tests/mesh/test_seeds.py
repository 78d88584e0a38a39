"""The seed configuration, each file alone and exactly as it is, on real traffic between pods of both nodes."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from lab import Lab, Pod
from tests.mesh.helpers import ECHO, HTTP, echo_server, echoes, fetch, http_server, seed

pytestmark = pytest.mark.privileged

#: Requests for a weighted split. With 80/20 and 400, eight standard deviations are 64 requests: chance does not fail this.
REQUESTS = 400
SIGMAS = 5


@dataclass(frozen=True)
class World:
    client: Pod
    far_client: Pod
    addresses: dict[str, str]
    servers: dict[str, Pod]


@pytest.fixture(scope="module")
def world(lab: Lab) -> Iterator[World]:
    """``web-app``, ``reviews`` and ``my-app`` in namespace default, v1 on one node and v2 on the other."""
    servers = {}
    addresses = {}
    for app in ("web-app", "reviews", "my-app"):
        for version, node in (("v1", "node1"), ("v2", "node2")):
            servers[f"{app}-{version}"] = http_server(
                lab,
                f"{app}-{version}",
                version=version,
                node=node,
                service_account=app,
                labels={"app": app, "version": version},
            )
        addresses[app] = lab.service(app, 80, target_port=HTTP)
    client = lab.pod("seed-client", node="node1", service_account="client")
    far_client = lab.pod("seed-far-client", node="node2", service_account="client")
    lab.settle()
    yield World(client, far_client, addresses, servers)
    for pod in (client, far_client, *servers.values()):
        pod.delete()


@pytest.fixture(autouse=True)
def alone(lab: Lab, world: World) -> None:
    """Each seed runs alone: nothing else of the users' is in force in its namespace."""
    assert [
        path.name
        for path in lab.cluster.policies.iterdir()
        if "default" in path.name or path.name[:2].isdigit()
    ] == []


def versions(answers: list[dict[str, Any]]) -> collections.Counter[str]:
    assert [a for a in answers if a.get("status") != 200] == []
    return collections.Counter(answer["body"]["version"] for answer in answers)


def assert_split(counted: collections.Counter[str], version: str, share: float) -> None:
    total = counted.total()
    expected = total * share
    deviation = (total * share * (1 - share)) ** 0.5
    assert abs(counted[version] - expected) < SIGMAS * deviation, counted
    assert set(counted) == {"v1", "v2"}


def test_without_configuration_both_versions_answer(world: World):
    counted = versions(fetch(world.client, f"http://{world.addresses['web-app']}/", count=60))
    assert set(counted) == {"v1", "v2"}


@pytest.mark.parametrize("per_connection", [1, 50], ids=["connection-per-request", "keep-alive"])
def test_01_splits_80_20_by_request(lab: Lab, world: World, per_connection: int):
    with lab.applied(seed("01")):
        url = f"http://{world.addresses['web-app']}/"
        assert_split(
            versions(fetch(world.client, url, count=REQUESTS, per_connection=per_connection)), "v2", 0.2
        )
        if per_connection > 1:
            # The choice is made per request: one connection sees both.
            assert_split(
                versions(fetch(world.far_client, url, count=REQUESTS, per_connection=per_connection)),
                "v2",
                0.2,
            )


def test_01_lets_only_clients_of_the_service_decide(lab: Lab, world: World):
    """The client stays who it is, at both versions."""
    with lab.applied(seed("01")):
        answers = fetch(world.client, f"http://{world.addresses['web-app']}/", count=30)
        assert {answer["body"]["client"] for answer in answers} == {world.client.address}


def test_02_refuses_plain_and_passes_mutual_tls(lab: Lab, world: World):
    lab.namespace("dev")
    lab.namespace("seed-plain", mesh=False)
    server = echo_server(lab, "seed-dev", node="node2", namespace="dev")
    stranger = lab.pod("seed-stranger", node="node1", namespace="seed-plain")
    try:
        with lab.applied(seed("02")):
            assert echoes(world.client, server.address, ECHO) == ""
            assert echoes(stranger, server.address, ECHO, timeout=2) != ""
    finally:
        server.delete()
        stranger.delete()


def test_03_and_04_route_by_header(lab: Lab, world: World):
    url = f"http://{world.addresses['reviews']}/"
    with lab.applied(seed("04")), lab.applied(seed("03")):
        jason = versions(fetch(world.client, url, count=30, headers={"end-user": "jason"}))
        assert set(jason) == {"v2"}
        others = versions(fetch(world.client, url, count=30))
        assert set(others) == {"v1"}
        almost = versions(fetch(world.client, url, count=10, headers={"end-user": "jasonx"}))
        assert set(almost) == {"v1"}


def test_03_and_04_decide_per_request_on_one_connection(lab: Lab, world: World):
    script = (
        "import http.client,json,sys\n"
        "c=http.client.HTTPConnection(sys.argv[1],80,timeout=10)\n"
        "for user in ('jason','other')*10:\n"
        "    c.request('GET','/',headers={'end-user':user}); r=c.getresponse(); print(user,json.loads(r.read())['version'])\n"
    )
    with lab.applied(seed("04")), lab.applied(seed("03")):
        done = world.client.run(["/usr/bin/python3", "-c", script, world.addresses["reviews"]], timeout=30)
    assert set(done.stdout.split("\n")[:-1]) == {"jason v2", "other v1"}


DESTINATION_RULE = {
    "apiVersion": "networking.istio.io/v1",
    "kind": "DestinationRule",
    "metadata": {"name": "my-app", "namespace": "default"},
    "spec": {
        "host": "my-app",
        "subsets": [{"name": version, "labels": {"version": version}} for version in ("v1", "v2")],
    },
}


def test_10_alone_answers_503_and_check_says_why(lab: Lab, world: World):
    with lab.applied(seed("10")):
        answers = fetch(world.client, f"http://{world.addresses['my-app']}/", count=10)
        assert {answer.get("status") for answer in answers} == {503}, answers
        said = lab.mycel("check", check=False)
        assert said.returncode != 0
        assert "my-app-vs" in said.stdout
        assert "v1" in said.stdout
        assert "subset" in said.stdout


def test_10_with_its_destination_rule_splits_90_10(lab: Lab, world: World):
    with lab.applied(DESTINATION_RULE, name="fixture-destinationrule.yaml"), lab.applied(seed("10")):
        counted = versions(fetch(world.client, f"http://{world.addresses['my-app']}/", count=REQUESTS))
        assert_split(counted, "v2", 0.1)


def counts(client: Pod, server: Pod) -> dict[str, int]:
    (answer,) = fetch(client, f"http://{server.address}:{HTTP}/counts")
    return dict(answer["body"])


def test_11_retries_what_it_names_and_bounds_the_time(lab: Lab, world: World):
    url = f"http://{world.addresses['my-app']}"
    with lab.applied(seed("11")):
        # Round robin over two pods, each fails its first request for the path: the third try is good.
        (answer,) = fetch(world.client, f"{url}/flaky/eleven/1")
        assert answer["status"] == 200, answer
        # 504 is a gateway error too; 500 is not.
        (answer,) = fetch(world.client, f"{url}/flaky/eleven-504/1/504")
        assert answer["status"] == 200, answer
        (answer,) = fetch(world.client, f"{url}/flaky/eleven-500/1/500")
        assert answer["status"] == 500, answer
        # Three retries are all there are: one request is asked four times.
        (answer,) = fetch(world.client, f"{url}/flaky/eleven-always/99")
        assert answer["status"] == 503
        asked = sum(
            counts(world.client, world.servers[f"my-app-{version}"]).get("/flaky/eleven-always/99", 0)
            for version in ("v1", "v2")
        )
        assert asked == 4
        # Each try has two seconds, and all of them five.
        (answer,) = fetch(world.client, f"{url}/slow/20")
        assert answer["status"] == 504
        assert 4.5 < answer["seconds"] < 6.5


def test_12_retries_by_istio_s_defaults(lab: Lab, world: World):
    """What never reached an application is tried again (connect-failure); an answer is an answer, 503 too."""
    url = f"http://{world.addresses['my-app']}"
    away = world.servers["my-app-v2"]
    with lab.applied(seed("12")):
        for status in (500, 503):
            (answer,) = fetch(world.client, f"{url}/flaky/twelve-{status}/1/{status}")
            assert answer["status"] == status, answer
        # Still Ready, but nobody listens: half of the first tries fail to connect.
        away.kill_processes()
        try:
            answers = fetch(world.client, f"{url}/", count=20)
            assert versions(answers) == {"v1": 20}
        finally:
            away.serve(away.app("http_server", HTTP, "--name", "my-app-v2", "--version", "v2"), HTTP)
            lab.settle()


def test_12_bounds_the_time(lab: Lab, world: World):
    with lab.applied(seed("12")):
        (answer,) = fetch(world.client, f"http://{world.addresses['my-app']}/slow/30")
        assert answer["status"] == 504
        assert 9 < answer["seconds"] < 12


def test_13_refuses_plain_in_its_namespace(lab: Lab, world: World):
    lab.namespace("seed-plain", mesh=False)
    stranger = lab.pod("seed-stranger-13", node="node2", namespace="seed-plain")
    server = world.servers["web-app-v1"]
    try:
        assert fetch(stranger, f"http://{server.address}:{HTTP}/")[0].get("status") == 200
        with lab.applied(seed("13")):
            assert "status" not in fetch(stranger, f"http://{server.address}:{HTTP}/")[0]
            (answer,) = fetch(world.far_client, f"http://{server.address}:{HTTP}/")
            assert answer["status"] == 200
    finally:
        stranger.delete()
