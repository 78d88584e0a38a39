"""A real Envoy speaks HBONE with the node proxy, as client and as server.

Envoy runs on a machine of the fabric that has nothing of the mesh and poses as a node: it has a credential, and a pod of
the cluster has that machine's address. So nothing but the wire is between Envoy and the node proxy.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from bench import envoy
from lab.cluster import PodRecord
from lab.lab import CONTROL_ADDRESS, Lab
from lab.place import Place
from lab.pod import Pod
from lab.processes import wait_until
from tests.peers import envoy_hbone
from tests.peers.envoy_hbone import Address

pytestmark = pytest.mark.privileged

ROOT = Path(__file__).resolve().parents[2]
CONTROLLER = f"{CONTROL_ADDRESS}:15012"
PORT = 8080
ENTRY = Address("127.0.0.1", 19000)
ADMIN = Address("127.0.0.1", 19901)
PEER_ID = "spiffe://cluster.local/ns/default/sa/peer"
WEB_ID = "spiffe://cluster.local/ns/default/sa/web"
CURL = ("/usr/bin/curl", "-sS", "--max-time", "15")
SIZE = 3_000_000


class Peer:
    """The machine that poses as node ``peer``, its pod, and that pod's SVID."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.folder = folder
        self.place: Place = lab.outsider("peer")
        self.address = _address_of(self.place)
        token = secrets.token_urlsafe(32)
        self.credential = folder / "credential"
        self.credential.write_text(token)
        (lab.folder / "credentials" / "peer").write_text(sha256(token.encode()).hexdigest())
        lab.service_account("peer")
        record = PodRecord("default", "peer", "peer", "peer", {"app": "peer"}, "peer", (PORT,))
        record.address, record.ready = self.address, True
        self.record = record
        lab.cluster.put(record.manifest())

    def get_svid(self) -> None:
        command = [sys.executable, "-m", "tests.peers.svid", CONTROLLER, str(self.lab.roots)]
        command += [str(self.credential), self.record.uid, str(self.folder)]
        self.place.run(["/usr/bin/env", f"PYTHONPATH={ROOT}", *command], timeout=30)

    def identity(self, peer: str) -> envoy.Identity:
        """The pod's SVID, for an Envoy that expects ``peer`` at the other end."""
        return envoy.Identity(
            self.folder / "chain.pem", self.folder / "key.pem", self.folder / "roots.pem", peer
        )

    @contextmanager
    def envoy(self, name: str, config: envoy_hbone.Json) -> Iterator[None]:
        """An Envoy of this configuration, for as long as the block runs."""
        command = envoy.command(envoy.write(config, self.folder / f"{name}.json"))
        log = self.folder / f"{name}.log"
        with log.open("w") as output:
            process = self.place.popen(command, stdout=output, stderr=output)

        def live() -> bool:
            assert process.poll() is None, log.read_text()[-2000:]
            ready = ["/usr/bin/curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://{ADMIN}/ready"]
            return self.place.run(ready, check=False).stdout == "200"

        try:
            wait_until(live, 15, f"Envoy {name} is live")
            yield
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=1) as lab:
        lab.namespace("default")
        yield lab


@pytest.fixture(scope="module")
def web(lab: Lab) -> Pod:
    pod = lab.pod("web", service_account="web", ports=(PORT,))
    pod.serve(pod.app("http_server", PORT, "--name", "web"), PORT)
    return pod


@pytest.fixture(scope="module")
def peer(lab: Lab, web: Pod, tmp_path_factory: pytest.TempPathFactory) -> Peer:
    made = Peer(lab, tmp_path_factory.mktemp("peer"))
    lab.settle()
    made.get_svid()
    return made


def client_config(web: Pod, identity: envoy.Identity) -> envoy_hbone.Json:
    return envoy_hbone.client_config(
        listen=ENTRY,
        hbone=Address(web.address, 15008),
        authority=f"{web.address}:{PORT}",
        identity=identity,
        admin=ADMIN,
    )


def opened(lab: Lab) -> float:
    """Connections of the peer's pod that the node proxy has counted."""
    metrics = lab.metrics("node1", "nodeproxy")
    return metrics.total("istio_tcp_connections_opened_total", source_principal=PEER_ID)


def test_envoy_is_the_client(lab: Lab, web: Pod, peer: Peer) -> None:
    """The application behind our server sees the client's own address, and every stream is counted."""
    before = opened(lab)
    with peer.envoy("client", client_config(web, peer.identity(WEB_ID))):
        for _ in range(3):
            answer = json.loads(peer.place.run([*CURL, f"http://{ENTRY}/"]).stdout)
            assert answer["pod"] == "web"
            assert answer["client"] == peer.address
            assert answer["local"] == [web.address, PORT]
        assert fetched(peer.place, f"http://{ENTRY}/bytes/{SIZE}") == SIZE
    assert opened(lab) - before == 4


def test_an_envoy_that_expects_somebody_else_gets_nothing(lab: Lab, web: Pod, peer: Peer) -> None:
    """Our server presents the destination workload's certificate, and no other."""
    stranger = peer.identity("spiffe://cluster.local/ns/default/sa/other")
    with peer.envoy("mistaken", client_config(web, stranger)):
        assert peer.place.run([*CURL, f"http://{ENTRY}/"], check=False).returncode != 0


def test_envoy_is_the_server(lab: Lab, web: Pod, peer: Peer) -> None:
    """A pod dials the peer's pod: Envoy gets CONNECT streams of one connection, with the source workload's SVID."""
    log = peer.folder / "streams.jsonl"
    backend = peer.place.popen(peer.place.app("http_server", PORT, "--name", "peer", "--bind", "127.0.0.1"))
    wait_until(lambda: peer.place.listening(PORT), 10, "the peer's application listens")
    config = envoy_hbone.server_config(
        listen=Address(peer.address, 15008),
        application=Address("127.0.0.1", PORT),
        identity=peer.identity(WEB_ID),
        admin=ADMIN,
        log=log,
    )
    with peer.envoy("server", config):
        for _ in range(3):
            answer = web.run([*CURL, f"http://{peer.address}:{PORT}/"]).stdout
            assert json.loads(answer)["pod"] == "peer"
        assert fetched(web, f"http://{peer.address}:{PORT}/bytes/{SIZE}") == SIZE
    backend.kill()
    backend.wait()
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(records) == 4
    assert {r["method"] for r in records} == {"CONNECT"}
    assert {r["authority"] for r in records} == {f"{peer.address}:{PORT}"}
    assert {r["peer"] for r in records} == {WEB_ID}
    assert {r["tls"] for r in records} == {"TLSv1.3"}
    assert {r["client"].rpartition(":")[0] for r in records} == {web.address}, (
        "dialled from the source pod's namespace"
    )
    assert len({r["connection"] for r in records}) == 1, "streams share one connection"


def test_the_ca_gives_no_svid_of_another_nodes_pod(lab: Lab, web: Pod, peer: Peer) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.peers.svid",
        CONTROLLER,
        str(lab.roots),
        str(peer.credential),
        web.uid,
    ]
    done = peer.place.run(
        ["/usr/bin/env", f"PYTHONPATH={ROOT}", *command, str(peer.folder)], timeout=30, check=False
    )
    assert done.returncode != 0
    assert "PERMISSION_DENIED" in done.stdout


def fetched(place: Place, url: str) -> int:
    """How many bytes of body came."""
    return int(place.run([*CURL, "-o", "/dev/null", "-w", "%{size_download}", url], timeout=20).stdout)


def _address_of(place: Place) -> str:
    shown = place.run(["/usr/sbin/ip", "-json", "-4", "addr", "show", "dev", "eth0"]).stdout
    address: str = json.loads(shown)[0]["addr_info"][0]["local"]
    return address
