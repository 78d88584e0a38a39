"""Two sockets joined, where one end is gone for good while the other has not taken everything yet."""

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from nodeproxy.loop import Loop, prepare
from nodeproxy.pair import Pair
from tests.nodeproxy.fakes.apps import read_all
from tests.nodeproxy.fakes.world import wait_until

SIZE = 4_000_000


class Running:
    """A loop in a thread."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.reasons: list[str] = []
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped:
            self.loop.turn(0.5)

    def join(self, one: socket.socket, two: socket.socket) -> None:
        for sock in (one, two):
            prepare(sock)
        self.loop.post(lambda: self._join(one, two))

    def _join(self, one: socket.socket, two: socket.socket) -> None:
        Pair(self.loop, one, two, lambda _pair, reason: self.reasons.append(reason))

    def close(self) -> None:
        self._stopped = True
        self._thread.join(5)
        self.loop.shutdown()


@pytest.fixture
def running() -> Iterator[Running]:
    made = Running()
    yield made
    made.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
    one.settimeout(10)
    return one, two


def unix_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


@pytest.mark.parametrize("kind", [tcp_pair, unix_pair])
@pytest.mark.parametrize("half_closed", [False, True])
def test_who_sends_everything_and_goes_is_read_to_the_end(
    running: Running, kind: Callable[[], tuple[socket.socket, socket.socket]], half_closed: bool
):
    reader, near = tcp_pair()
    writer, far = kind()
    running.join(near, far)
    if half_closed:
        reader.shutdown(socket.SHUT_WR)
        assert writer.recv(1) == b""

    def send_and_go() -> None:
        writer.sendall(b"x" * SIZE)
        writer.close()

    thread = threading.Thread(target=send_and_go)
    thread.start()
    thread.join(0.5)  # the rest stands in buffers when the writer goes
    assert len(read_all(reader)) == SIZE
    thread.join(5)
    reader.close()
    wait_until(lambda: running.reasons, "both sockets are closed")
