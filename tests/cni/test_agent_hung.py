"""The plugin with an agent that is there and of no use: every call ends in time, with an error that says what is wrong.

Whoever sits at the socket is a real peer; the last test stops a real agent under load and lets it go on.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cni import protocol
from tests.agent.pods import Netns, workload
from tests.agent.process import AgentProcess
from tests.cni.plugin import Called, Plugin, network, previous

pytestmark = pytest.mark.privileged

TIMEOUT = 0.7
#: What a call may take beyond its timeout, seconds: two starts of an interpreter on a busy machine.
START = 2.0


class Peer:
    """Listens where the agent does; ``behave`` has each connection to itself, in a thread."""

    def __init__(self, run: Path, behave: Callable[[socket.socket], None], *, accepts: bool = True) -> None:
        self._behave = behave
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.bind(str(run / protocol.SOCKET_NAME))
        self._server.listen(128 if accepts else 0)
        self._open: list[socket.socket] = []
        if accepts:
            threading.Thread(target=self._accept, daemon=True).start()
        else:
            # The queue takes one more than its length; whoever comes then is not let in.
            for _ in range(2):
                filler = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                filler.setblocking(False)
                filler.connect_ex(str(run / protocol.SOCKET_NAME))
                self._open.append(filler)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            self._open.append(sock)
            threading.Thread(target=self._behave, args=(sock,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        for sock in (self._server, *self._open):
            sock.close()


def never_answers(sock: socket.socket) -> None:
    pass


def never_answers_but_reads(sock: socket.socket) -> None:
    sock.recv(1 << 17)


def answers_half(sock: socket.socket) -> None:
    sock.recv(1 << 17)
    sock.send(protocol.reply()[:20])


def answers_garbage(sock: socket.socket) -> None:
    sock.recv(1 << 17)
    sock.send(b"\x00\xff" * 40_000)


def answers_too_much(sock: socket.socket) -> None:
    sock.recv(1 << 17)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    sock.send(protocol.reply(message="x" * 150_000))


def ends(sock: socket.socket) -> None:
    sock.recv(1 << 17)
    sock.shutdown(socket.SHUT_RDWR)


PEERS = [never_answers, never_answers_but_reads, answers_half, answers_garbage, answers_too_much, ends]


@pytest.fixture(scope="module")
def netns() -> Iterator[Netns]:
    with Netns(wired=True) as made:
        yield made


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    run = tmp_path / "run"
    run.mkdir()
    return Plugin(tmp_path / "bin", run, timeout=TIMEOUT, pinDir=str(tmp_path / "pins"))


def call(plugin: Plugin, netns: Netns, command: str, namespace: str = "shop", **keys: object) -> Called:
    config = plugin.config() | {"prevResult": previous(), "cni.dev/valid-attachments": []} | keys
    return plugin.call(
        command,
        config,
        CNI_CONTAINERID="c",
        CNI_NETNS=str(netns.path),
        CNI_IFNAME="eth0",
        CNI_ARGS=f"K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=p;K8S_POD_UID=uid-p",
    )


def timed(work: Callable[[], Called]) -> tuple[Called, float]:
    begin = time.monotonic()
    return work(), time.monotonic() - begin


def judge_every_command(plugin: Plugin, netns: Netns) -> None:
    protocol.write_outside(str(plugin.run_dir), ["plain"])
    calls = {
        "ADD": lambda: call(plugin, netns, "ADD"),
        "ADD outside": lambda: call(plugin, netns, "ADD", "plain"),
        "ADD never inside": lambda: call(plugin, netns, "ADD", "mycel-system", outsideNamespaces=["mycel-system"]),
        "CHECK": lambda: call(plugin, netns, "CHECK"),
        "DEL": lambda: call(plugin, netns, "DEL"),
        "GC": lambda: call(plugin, netns, "GC"),
        "STATUS": lambda: call(plugin, netns, "STATUS"),
        "STATUS of a node that is ready": lambda: call(plugin, netns, "STATUS", nodeStatus="ready"),
        "VERSION": lambda: call(plugin, netns, "VERSION"),
    }  # fmt: skip
    with ThreadPoolExecutor(len(calls)) as pool:
        done = dict(zip(calls, pool.map(timed, calls.values()), strict=True))
    assert {name: took for name, (_, took) in done.items() if took > TIMEOUT + START} == {}
    codes = {name: called.code for name, (called, _) in done.items()}
    assert codes == {
        "ADD": 11,
        "ADD outside": 0,
        "ADD never inside": 0,
        "CHECK": 11,
        "DEL": 0,
        "GC": 11,
        "STATUS": 51,
        "STATUS of a node that is ready": 0,
        "VERSION": 0,
    }
    assert str(plugin.run_dir / protocol.SOCKET_NAME) in done["ADD"][0].text
    (note,) = (plugin.run_dir / protocol.NOTES).iterdir()
    assert json.loads(note.read_text())["container_id"] == "c"


@pytest.mark.parametrize("behave", PEERS, ids=lambda behave: behave.__name__)
def test_every_call_ends_in_time(plugin: Plugin, netns: Netns, behave: Callable[[socket.socket], None]):
    peer = Peer(plugin.run_dir, behave)
    try:
        judge_every_command(plugin, netns)
    finally:
        peer.close()


def test_a_queue_that_is_full(plugin: Plugin, netns: Netns):
    peer = Peer(plugin.run_dir, never_answers, accepts=False)
    try:
        judge_every_command(plugin, netns)
    finally:
        peer.close()


def test_what_is_not_needed_is_not_waited_for(plugin: Plugin, netns: Netns):
    """With the timeout of a real node."""
    peer = Peer(plugin.run_dir, never_answers)
    outside = {"outsideNamespaces": ["mycel-system"]}
    try:
        with ThreadPoolExecutor(3) as pool:
            status = pool.submit(timed, lambda: call(plugin, netns, "STATUS", nodeStatus="ready", timeout=15))
            ours = pool.submit(
                timed, lambda: call(plugin, netns, "DEL", "mycel-system", timeout=15, **outside)
            )
            theirs = pool.submit(timed, lambda: call(plugin, netns, "DEL", timeout=15))
            for future, limit in (
                (status, protocol.BRIEF_TIMEOUT),
                (ours, protocol.BRIEF_TIMEOUT),
                (theirs, protocol.DEL_TIMEOUT),
            ):
                called, took = future.result()
                assert called.code == 0
                assert limit <= took < limit + START
    finally:
        peer.close()


def test_an_agent_that_was_stopped_goes_on_as_if_nothing_had_been(tmp_path: Path):
    """What gave up meanwhile is not attached; what was removed meanwhile is removed; what comes next is served."""
    pods = [f"p{n}" for n in range(24)]
    agent = AgentProcess(tmp_path, *(workload(pod, addresses=()) for pod in pods))
    plugin = Plugin(tmp_path / "bin", agent.run, timeout=1)
    spaces = {pod: Netns(wired=True).__enter__() for pod in pods}
    configs = {
        pod: network(space, plugin.config(prevResult=previous(f"10.77.0.{number}/24")))
        for number, (pod, space) in enumerate(spaces.items(), 2)
    }

    def ask(command: str, pod: str) -> Called:
        return plugin.call(
            command,
            configs[pod],
            CNI_CONTAINERID=f"c-{pod}",
            CNI_NETNS=str(spaces[pod].path),
            CNI_IFNAME="eth0",
            CNI_ARGS=f"K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod};K8S_POD_UID=uid-{pod}",
        )

    def book() -> set[str]:
        found = json.loads((agent.state / "pods.json").read_text())["pods"]
        return {attachment["container_id"].removeprefix("c-") for attachment in found}

    before, during = pods[:8], pods[8:]
    try:
        with agent, ThreadPoolExecutor(len(pods)) as pool:
            assert {called.code for called in pool.map(lambda pod: ask("ADD", pod), before)} == {0}
            agent.pause()
            begin = time.monotonic()
            adds = pool.map(lambda pod: ask("ADD", pod), during)
            dels = pool.map(lambda pod: ask("DEL", pod), before)
            assert {called.code for called in adds} == {11}
            assert {called.code for called in dels} == {0}
            assert time.monotonic() - begin < 1 + 4 * START
            agent.resume()
            assert ask("ADD", during[0]).code == 0
            deadline = time.monotonic() + 10
            while book() != {during[0]}:
                assert time.monotonic() < deadline, book()
                time.sleep(0.05)
            assert ask("CHECK", during[0]).code == 0
            # For good: nothing of what was asked meanwhile comes after.
            agent.wait_for("the plugin has given up waiting")
            assert book() == {during[0]}
    finally:
        agent.clean_up()
        for space in spaces.values():
            space.remove()
