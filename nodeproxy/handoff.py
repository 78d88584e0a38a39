"""Streams that others hand over: l7proxy through ``nodeproxy.sock``, a real Envoy through the kernel (nodeproxy/api.py).

Owns the header, the choice of the way (direct where the destination is on this node or not in the mesh, HBONE otherwise), the
status byte, and with a real Envoy the legs to and from it. A destination that the controller's stream does not name goes direct
only once that stream has been complete.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

from agent.api import ListenerKind, Purpose
from bpf.maps import MapError
from common import logs
from nodeproxy import api
from nodeproxy.accounting import Outcome
from nodeproxy.agent_client import AgentClient, Pod
from nodeproxy.api import Handoff, HeaderError, Status, Tlv
from nodeproxy.loop import IN, OUT, Loop, reset
from nodeproxy.mesh import Mesh
from nodeproxy.pair import Pair
from nodeproxy.tunnel import STATUS, Tunnel, Tunnels

_log = logs.get(__name__)

#: Seconds for the header, and for a direct connection.
HEADER_TIMEOUT = 5.0
CONNECT_TIMEOUT = 10.0
_SO_NETNS_COOKIE = 71
#: Bytes of a PROXY v2 header that tell its length.
_PREFIX = 16


class Handoffs:
    """All streams that came by a header."""

    def __init__(self, loop: Loop, mesh: Mesh, agent: AgentClient, tunnels: Tunnels, node: str) -> None:
        self.loop = loop
        self.mesh = mesh
        self.agent = agent
        self.tunnels = tunnels
        self.node = node
        self.pairs: dict[Pair, Pod] = {}
        self._listeners: list[socket.socket] = []
        self._path: Path | None = None
        self._inode = 0  #: of our socket

    # --- listeners ---------------------------------------------------------------------------------------------------

    def listen(self, path: Path) -> None:
        """Take streams on a unix socket, in the place of whoever did. :raises OSError: it cannot be made."""
        if self._owns(path):
            return
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.unlink(missing_ok=True)
            mask = os.umask(0o117)
            try:
                listener.bind(str(aside))
            finally:
                os.umask(mask)
            listener.listen(1024)
            self._inode = aside.stat().st_ino
            # Renamed when it listens, also over a predecessor's: nobody ever meets a path that refuses.
            aside.rename(path)
        except OSError:
            listener.close()
            raise
        self._path = path
        self._accept(listener, lambda sock, _peer: _Arrival(self, sock, answer=True).begin())

    def listen_for_envoy(self) -> None:
        """Take the dials of a real Envoy, which the kernel turns to here. :raises OSError: the port is taken."""
        self._listen_for_envoy(socket.AF_INET, "127.0.0.1")
        try:
            self._listen_for_envoy(socket.AF_INET6, "::1")
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
            _log.info("no IPv6 here: Envoy has none either", reason=str(error))

    def _listen_for_envoy(self, family: int, address: str) -> None:
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, ListenerKind.OUTBOUND.port))
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
        cookie = int.from_bytes(listener.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), "little")

        def arrived(sock: socket.socket, peer: tuple[str, int]) -> None:
            try:
                captured = self.agent.captured
                found = (
                    captured.find(cookie, peer[0], peer[1], ListenerKind.OUTBOUND.port) if captured else None
                )
            except MapError as error:
                _log.error("captured cannot be read", reason=str(error))
                found = None
            if found is None:
                _log.warning("a connection that no Envoy of this node made", client=peer[0])
                reset(self.loop, sock)
                return
            destination = (found.destination_address, found.destination_port)
            _Arrival(self, sock, answer=False, destination=destination).begin()

        self._accept(listener, arrived)

    def _accept(
        self, listener: socket.socket, arrived: Callable[[socket.socket, tuple[str, int]], None]
    ) -> None:
        listener.setblocking(False)
        self._listeners.append(listener)
        self.loop.listen(listener, arrived)

    def stop(self) -> None:
        """Take no more."""
        for listener in self._listeners:
            self.loop.close(listener)
        self._listeners.clear()
        if self._path is not None:
            if self._owns(self._path):
                with contextlib.suppress(OSError):
                    self._path.unlink()
            self._path = None

    def _owns(self, path: Path) -> bool:
        """Whether the socket at the path is ours, not a successor's."""
        try:
            return bool(self._inode) and path.stat().st_ino == self._inode
        except OSError:
            return False

    # --- pods --------------------------------------------------------------------------------------------------------

    def pod_of(self, handoff: Handoff) -> Pod | None:
        """The client's pod: of this node, at that address, and of that UID if one is given."""
        uid = handoff.source_uid
        for pod in self.agent.pods.values():
            if handoff.client[0] in pod.addresses and (not uid or pod.uid == uid):
                return pod
        return None

    def join(self, pod: Pod, one: socket.socket, two: socket.socket, early: bytes = b"") -> None:
        pair = Pair(self.loop, one, two, self._parted, early)
        if not pair.closed:
            self.pairs[pair] = pod

    def _parted(self, pair: Pair, _reason: str) -> None:
        self.pairs.pop(pair, None)

    def withdraw(self, pod: Pod) -> None:
        self.close("pod withdrawn", pod)

    def close(self, reason: str, pod: Pod | None = None) -> None:
        """End all direct legs, or all of a pod."""
        for pair in [pair for pair, owner in self.pairs.items() if pod is None or owner is pod]:
            pair.close(reason)

    # --- a real Envoy in l7proxy's place -------------------------------------------------------------------------------

    def to_envoy(
        self, pod: Pod, sock: socket.socket, client: tuple[str, int], service: tuple[str, int], envoy: Path
    ) -> None:
        """A connection that was captured for L7: to Envoy, with the header that says whose it is."""
        upstream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        upstream.setblocking(False)
        header = api.encode(Handoff(client, service, {Tlv.SOURCE_UID: pod.uid.encode()}))
        try:
            upstream.connect(str(envoy))
            if upstream.send(header) != len(header):
                raise OSError(errno.EAGAIN, "header not taken")
        except OSError as error:
            _log.error("Envoy is not there: connection refused", socket=str(envoy), reason=str(error))
            upstream.close()
            reset(self.loop, sock)
            return
        self.join(pod, sock, upstream)


class _Arrival:
    """One stream, from its header to its way."""

    def __init__(
        self,
        handoffs: Handoffs,
        sock: socket.socket,
        *,
        answer: bool,
        destination: tuple[str, int] | None = None,
    ) -> None:
        """:param answer: a status byte is expected. :param destination: known better than by the header."""
        self._all = handoffs
        self._sock = sock
        self._answer = answer
        self._destination = destination
        self._data = bytearray()
        self._dialled: socket.socket | None = None
        self._pod: Pod | None = None
        self._over = False
        self._timer = handoffs.loop.later(HEADER_TIMEOUT, lambda: self._fail(Status.TIMEOUT, "no header"))

    def begin(self) -> None:
        self._all.loop.add(self._sock.fileno(), IN, self._on_header)

    def abort(self) -> None:
        self._fail(Status.UNREACHABLE, "internal error")

    def _on_header(self, _events: int) -> None:
        # Not a byte more than the header is taken: the rest is payload, and is read by who carries it.
        data = self._data
        try:
            while True:
                have = len(data)
                need = _PREFIX if have < _PREFIX else _PREFIX + int.from_bytes(data[14:_PREFIX], "big")
                more = self._sock.recv(need - have)
                if not more:
                    self._fail(Status.INVALID, "the header is cut")
                    return
                data += more
                decoded = api.decode(data)
                if decoded is not None:
                    break
        except BlockingIOError:
            return
        except (OSError, HeaderError) as error:
            self._fail(Status.INVALID, str(error))
            return
        self._choose(decoded[0])

    def _choose(self, handoff: Handoff) -> None:
        every = self._all
        self._timer.cancel()
        every.loop.remove(self._sock.fileno())
        pod = self._pod = every.pod_of(handoff)
        if pod is None:
            self._fail(
                Status.INVALID, f"no pod of this node at {handoff.client[0]}, UID {handoff.source_uid!r}"
            )
            return
        destination = self._destination or handoff.destination
        workload = every.mesh.at(destination[0])
        local = any(destination[0] in p.addresses for p in every.agent.pods.values())
        own = every.mesh.workloads.get(pod.uid)
        if not every.mesh.synced:
            self._fail(Status.IDENTITY, "the mesh is not known yet")
        elif own is not None and (refusal := every.mesh.refuses_egress(own, *destination)):
            self._fail(Status.DENIED, refusal)
        elif (
            local
            or workload is None
            or not every.mesh.is_reached_by_mesh(workload)
            or workload.node == every.node
        ):
            self._timer = every.loop.later(
                CONNECT_TIMEOUT, lambda: self._fail(Status.TIMEOUT, "connect timeout")
            )
            every.agent.get_socket(
                pod, Purpose.OUTBOUND, destination[0], lambda sock: self._dial(sock, destination)
            )
        else:
            trace = handoff.tlvs.get(Tlv.TRACEPARENT, b"").decode("ascii", "replace")
            self._over = True
            Tunnel(
                every.tunnels,
                pod,
                self._sock,
                handoff.client,
                destination,
                traceparent=trace,
                ready=self._tunnel_ready if self._answer else None,
            ).start()

    def _tunnel_ready(self, outcome: Outcome) -> None:
        self._status(STATUS[outcome])

    def _status(self, status: Status) -> None:
        if self._answer:
            with contextlib.suppress(OSError):
                self._sock.send(bytes((status,)))

    def _dial(self, sock: socket.socket | None, destination: tuple[str, int]) -> None:
        if self._over:
            if sock is not None:
                sock.close()
            return
        if sock is None:
            self._fail(Status.UNREACHABLE, "no socket from the agent")
            return
        self._dialled = sock
        code = sock.connect_ex(destination)
        if code not in (0, errno.EINPROGRESS):
            self._fail(Status.UNREACHABLE, os.strerror(code))
            return
        self._all.loop.add(sock.fileno(), OUT, self._connected)

    def _connected(self, _events: int) -> None:
        sock = self._dialled
        assert sock is not None and self._pod is not None
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail(Status.UNREACHABLE, os.strerror(code))
            return
        self._over = True
        self._timer.cancel()
        self._all.loop.remove(sock.fileno())
        self._status(Status.CONNECTED)
        self._all.join(self._pod, self._sock, sock)

    def _fail(self, status: Status, reason: str) -> None:
        if self._over:
            return
        self._over = True
        self._timer.cancel()
        _log.warning("handed-over stream refused", status=status.name, reason=reason)
        if self._dialled is not None:
            self._all.loop.close(self._dialled)
        self._status(status)
        if self._answer:
            self._all.loop.close(self._sock)
        else:
            reset(self._all.loop, self._sock)
