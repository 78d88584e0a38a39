"""``podman run`` with the node's list of plugins: libcni calls the chain, not the lab's runtime."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import Lab
from lab.podman import Podman
from tests.requirements import require_program

pytestmark = pytest.mark.privileged

FETCH = (
    "exec 3<>/dev/tcp/{address}/8080; printf 'GET /from-podman HTTP/1.0\\r\\n\\r\\n' >&3;"
    ' while read -r line <&3; do echo "$line"; done; echo "$line"'
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    require_program("podman")
    require_program("runc")
    with Lab(nodes=1, mesh=False) as lab:
        lab.namespace("default")
        yield lab


@pytest.fixture(scope="module")
def podman(lab: Lab) -> Podman:
    podman = Podman(lab.nodes[0], f"/{lab.cgroup.name}/podman")
    podman.make_image()
    return podman


def test_container_is_connected_by_the_chain_and_disconnected(lab: Lab, podman: Podman):
    node = lab.nodes[0]
    server = lab.pod("server")
    server.serve(server.app("http_server", 8080), 8080)
    leases = node.root / "var/lib/cni/networks/pods"
    before = set(leases.glob("10.*"))
    output = podman.run(FETCH.format(address=server.address), name="shell").stdout
    assert "HTTP/1.1 200 OK" in output
    assert '"path": "/from-podman"' in output
    assert set(leases.glob("10.*")) == before
