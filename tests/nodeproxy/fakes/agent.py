"""An agent whose pods are addresses of 127/8: it speaks agent/api.py, and makes its sockets in this namespace."""

import contextlib
import socket
import threading
from pathlib import Path

import msgspec

from agent import api
from bpf.wire import Captured
from common import seqpacket


class Agent:
    """Serves one proxy at a time, in a thread."""

    def __init__(self, path: Path, node: str) -> None:
        self.path = path
        self.node = node
        self.pods: dict[tuple[str, int], api.Enroll] = {}
        self.hellos: list[api.Hello] = []
        self.ready = threading.Event()  #: the proxy said Serve
        self.sockets_given = 0
        self.errors = ""  #: answered to GetSockets when set
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()
        self.start()

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        seqpacket.prepare(self._listener)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, args=(self._listener,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """As a crash would: what was given out stays."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            if self._connection is not None:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()

    def enroll(self, pod: api.Enroll) -> None:
        with self._lock:
            self.pods[pod.uid, pod.netns_cookie] = pod
            if self._connection is not None and self.hellos:
                self._hand(pod, ())

    def describe(self, pod: api.Enroll) -> None:
        """Anew, one that has its listeners."""
        with self._lock:
            assert self._connection is not None
            self.pods[pod.uid, pod.netns_cookie] = pod
            seqpacket.send(self._connection, api.encode(pod))

    def say(self, message: api.Serving | api.Drain) -> None:
        """As when a successor serves, or has died."""
        with self._lock:
            assert self._connection is not None
            seqpacket.send(self._connection, api.encode(message))

    def withdraw(self, uid: str, cookie: int) -> None:
        with self._lock:
            self.pods.pop((uid, cookie), None)
            if self._connection is not None:
                seqpacket.send(self._connection, api.encode(api.Withdraw(uid, cookie)))

    def _hand(self, pod: api.Enroll, held: tuple[api.Held, ...]) -> None:
        assert self._connection is not None
        kinds = [
            kind
            for kind in self.hellos[-1].kinds
            if (pod.uid, pod.netns_cookie, kind) not in {(h.uid, h.netns_cookie, h.kind) for h in held}
        ]
        listeners = []
        for kind in kinds:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((pod.address, kind.port))
            listener.listen(512)
            listener.setblocking(False)
            listeners.append(listener)
        message = msgspec.structs.replace(pod, listeners=tuple(kinds))
        seqpacket.send(self._connection, api.encode(message), tuple(s.fileno() for s in listeners))
        for listener in listeners:
            listener.close()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                # A proxy that ends does not wait for its answers.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self._session(connection)
                with self._lock:
                    self._connection = None

    def _session(self, connection: socket.socket) -> None:
        seqpacket.prepare(connection)
        while True:
            try:
                data, _ = seqpacket.receive(connection)
            except OSError:
                data = b""
            if not data:
                return
            message = api.decode_from_proxy(data)
            with self._lock:
                if isinstance(message, api.Hello):
                    self._connection = connection
                    self.hellos.append(message)
                    seqpacket.send(connection, api.encode(api.Welcome(self.node)))
                    for pod in self.pods.values():
                        self._hand(pod, message.held)
                    for mark in (api.Known(), api.Serving()):
                        seqpacket.send(connection, api.encode(mark))
                elif isinstance(message, api.Serve):
                    self.ready.set()
                else:
                    self._give(connection, message)

    def _give(self, connection: socket.socket, request: api.GetSockets) -> None:
        pod = self.pods.get((request.uid, request.netns_cookie))
        if pod is None or self.errors:
            seqpacket.send(connection, api.encode(api.Sockets(request.id, 0, self.errors or "no such pod")))
            return
        sockets = []
        for _ in range(request.count):
            sock = socket.socket(socket.AF_INET6 if request.ipv6 else socket.AF_INET)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if request.purpose is api.Purpose.OUTBOUND and not request.ipv6:
                sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
                sock.bind((pod.address, 0))
            sockets.append(sock)
        self.sockets_given += len(sockets)
        seqpacket.send(
            connection, api.encode(api.Sockets(request.id, len(sockets))), tuple(s.fileno() for s in sockets)
        )
        for sock in sockets:
            sock.close()


class CapturedTable:
    """The kernel's ``captured`` map, as :class:`bpf.maps.CapturedMap` reads it."""

    def __init__(self) -> None:
        self.destination: tuple[str, int] | None = None  #: of clients that ``destinations`` does not name
        self.destinations: dict[tuple[str, int], tuple[str, int]] = {}
        self.service: tuple[str, int] | None = None

    def find(self, netns: int, client_address: str, client_port: int, listener_port: int) -> Captured | None:
        destination = self.destinations.get((client_address, client_port), self.destination)
        if destination is None:
            return None
        service = self.service or destination
        return Captured(destination[0], service[0], destination[1], service[1], 16)

    def close(self) -> None:
        pass
