"""A real container runtime with our list of plugins: libcni speaks to our plugin as the specification says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import Lab, Node, Pod
from lab.podman import Podman
from tests.mesh.helpers import HTTP, http_server
from tests.requirements import require_program

pytestmark = pytest.mark.privileged

NAMESPACE = "podman"
FETCH = (
    "exec 3<>/dev/tcp/{address}/{port} || exit 7; printf 'GET /from-podman HTTP/1.0\\r\\n\\r\\n' >&3;"
    ' while read -r line <&3; do echo "$line"; done; echo "$line"'
)


@pytest.fixture(scope="module")
def node(lab: Lab) -> Iterator[Node]:
    node = lab.node("node1")
    yield node
    node.configure_network()


@pytest.fixture(scope="module")
def podman(lab: Lab, node: Node) -> Podman:
    require_program("podman")
    require_program("runc")
    podman = Podman(node, f"/{lab.cgroup.name}/podman")
    podman.make_image()
    return podman


@pytest.fixture(scope="module")
def server(lab: Lab) -> Pod:
    lab.namespace(NAMESPACE)
    return http_server(lab, "podman-server", node="node2", namespace=NAMESPACE)


def test_container_without_a_pod_s_uid_is_refused_by_default(node: Node, podman: Podman, server: Pod):
    node.configure_network()
    done = podman.run("true", name="refused", check=False)
    assert done.returncode != 0
    assert "K8S_POD_UID" in done.stdout


def test_container_runs_outside_the_mesh_when_the_list_says_so(node: Node, podman: Podman, server: Pod):
    node.configure_network(unknownPods="pass")
    output = podman.run(FETCH.format(address=server.address, port=HTTP), name="passed").stdout
    assert "HTTP/1.1 200 OK" in output
    assert '"path": "/from-podman"' in output
