"""An HBONE peer that does what no good one would: the core over blocking TLS, with any certificate."""

import socket
import threading
import time
from typing import Any

from OpenSSL import SSL

from nodeproxy import h2core
from nodeproxy.h2core import Connection
from nodeproxy.h2sending import Stream
from nodeproxy.tls import Svid, Trust, credentials


class Peer:
    """One end of a connection that a test drives step by step."""

    def __init__(self, sock: socket.socket, context: SSL.Context, *, client: bool) -> None:
        self.sock = sock
        sock.settimeout(10)
        self.core = Connection(client=client)
        self.tls = SSL.Connection(context, None)
        if client:
            self.tls.set_connect_state()
        else:
            self.tls.set_accept_state()
        self.events: list[tuple[int, Any, Any]] = []

    @classmethod
    def dial(cls, address: str, source: str, svid: Svid | None, trust: Trust, port: int = 15008) -> "Peer":
        """A client; without an SVID it presents none."""
        if svid is not None:
            context = credentials(svid, trust).client
        else:
            context = SSL.Context(SSL.TLS_CLIENT_METHOD)
            context.set_alpn_protos([b"h2"])
        return cls(socket.create_connection((address, port), 10, (source, 0)), context, client=True)

    def _flush_tls(self) -> None:
        try:
            while data := self.tls.bio_read(65536):
                self.sock.sendall(data)
        except SSL.WantReadError:
            pass

    def handshake(self) -> None:
        """:raises SSL.Error: it fails. :raises OSError: the peer is gone."""
        while True:
            try:
                self.tls.do_handshake()
            except SSL.WantReadError:
                self._flush_tls()
                self._fill()
            except SSL.Error:
                self._flush_tls()
                raise
            else:
                self._flush_tls()
                return

    def _fill(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionResetError("end of connection")
        self.tls.bio_write(data)

    def flush(self) -> None:
        core = self.core
        while core.head < core.tail:
            core.sent(self.tls.send(core.out_view[core.head : core.tail]))
        self._flush_tls()

    def until(self, kind: int) -> tuple[int, Any, Any]:
        """The next event of a kind, everything before it dropped.

        :raises SSL.Error: the connection ended with an alert. :raises OSError: or without.
        """
        while True:
            while self.events:
                event = self.events.pop(0)
                if event[0] == kind:
                    return event
            self.flush()
            try:
                data = self.tls.recv(65536)
            except SSL.WantReadError:
                self._fill()
                continue
            self.events += [
                (k, s, bytes(v) if k == h2core.DATA else v)
                for k, s, v in self.core.receive(memoryview(data), time.monotonic())
            ]

    def connect(self, authority: str, fields: list[tuple[bytes, bytes]] | None = None) -> Stream:
        stream = self.core.connect(authority, fields or [])
        self.flush()
        return stream

    def status(self, authority: str) -> int:
        """The answer to a CONNECT."""
        self.connect(authority)
        status: int = self.until(h2core.RESPONSE)[2]
        return status

    def close(self) -> None:
        self.sock.close()


class HboneServer:
    """A server on an address that answers one connection with whatever certificate; ``result`` is what came of it."""

    def __init__(self, address: str, svid: Svid, trust: Trust) -> None:
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((address, 15008))
        self.listener.listen()
        self.requests = 0
        self._context = credentials(svid, trust).server
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            peer = Peer(sock, self._context, client=False)
            try:
                peer.handshake()
                while True:
                    _, stream, _request = peer.until(h2core.REQUEST)
                    self.requests += 1
                    peer.core.respond(stream, 200, end=False)
            except (OSError, SSL.Error):
                peer.close()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join(5)
