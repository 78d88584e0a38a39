"""The agent's client: which pods are here, their listeners, and sockets in their namespaces.

Owns the SEQPACKET connection, the stock of ready sockets per pod, and the pods themselves (:class:`Pod`), the part of a
successor and of a predecessor as far as the agent is concerned (:mod:`agent.api`). When the agent goes
away everything stays, the connection is tried again, and what is held is told; pods that a returned agent does not name
within a while are withdrawn.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
import resource
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from agent import api
from agent.api import ListenerKind, Purpose
from bpf.maps import CapturedMap, MapError
from common import logs, seqpacket
from nodeproxy.loop import IN, OUT, Loop, Timer, prepare

_log = logs.get(__name__)

_RETRY_FIRST, _RETRY_MOST = 0.1, 2.0
#: Seconds that a returned agent has to name the pods it knows.
_GRACE = 10.0
#: Seconds that a connection waits for a socket: longer than an agent takes to start, on a machine under load too.
PATIENCE = 20.0
#: Seconds that a listener is kept when a newer one has come in its place: connections may be on their way to it.
LINGER = 3.0
_SO_COOKIE = 57
#: Sockets kept ready for each pod at least, and the most asked for at once.
STOCK = {Purpose.OUTBOUND: 2, Purpose.DELIVERY: 8}
_MOST = 32
#: A pod's stock lasts this many seconds at the rate of its last ones, so that nobody waits for an agent that restarts (kubelet
#: backs off for ten seconds), up to this many sockets; all stocks together take this part of the descriptors at most.
RESERVE = 20.0
STOCK_MOST = 512
_DESCRIPTORS = 1 / 8
_RATE_KEPT = 0.8  #: of a rate that was higher, each second

SocketWaiter = Callable[[socket.socket | None], None]
#: Of a stock: a pod's UID and netns cookie, what its sockets are for, whether they are IPv6's.
_StockKey = tuple[str, int, Purpose, bool]


@dataclass(eq=False)
class Pod:
    """A pod of this node: one sandbox of it, as the agent describes it."""

    uid: str
    netns_cookie: int
    described: api.Enroll
    listeners: dict[ListenerKind, socket.socket] = field(default_factory=dict)
    withdrawn: bool = False
    left: bool = False  #: the mesh, and runs on: no new connections, what is open goes on

    @property
    def address(self) -> str:
        return self.described.address

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.described.own

    @property
    def identity(self) -> str:
        return self.described.identity


class PodOwner(Protocol):
    """Who is told about pods. All calls come on the loop's thread."""

    def on_pod(self, pod: Pod) -> None:
        """New, or described anew."""

    def on_listener(self, pod: Pod, kind: ListenerKind, listener: socket.socket) -> None: ...

    def on_left(self, pod: Pod) -> None:
        """It runs on outside the mesh; its listeners are closed already."""

    def on_withdraw(self, pod: Pod) -> None:
        """Close every connection of the pod; its listeners and sockets are closed already."""

    def on_known(self) -> None:
        """Every pod has been told of."""

    def on_serving(self) -> None:
        """New connections come here, all of them."""

    def on_drain(self) -> None:
        """They come to a successor."""


@dataclass(eq=False)
class _Stock:
    least: int
    ready: collections.deque[socket.socket] = field(default_factory=collections.deque)
    waiters: collections.deque[tuple[SocketWaiter, Timer]] = field(default_factory=collections.deque)
    asked: int = 0
    target: int = 0
    taken: int = 0  #: in this second
    rate: float = 0.0  #: a second

    def __post_init__(self) -> None:
        self.target = self.least

    def look(self) -> None:
        """A second has passed: how many would be wanted."""
        self.rate = max(self.taken, self.rate * _RATE_KEPT)
        self.taken = 0
        self.target = max(self.least, min(STOCK_MOST, math.ceil(self.rate * RESERVE)))

    def trim(self) -> None:
        """What is wanted no more."""
        if len(self.ready) > 2 * self.target:
            while len(self.ready) > self.target:
                self.ready.pop().close()


class AgentClient:
    def __init__(self, loop: Loop, path: Path, kinds: tuple[ListenerKind, ...], owner: PodOwner) -> None:
        self.pods: dict[tuple[str, int], Pod] = {}
        self.captured: CapturedMap | None = None
        self.connected = False
        self._serving = False  #: ready to serve, which every agent is told
        self._loop = loop
        self._path = path
        self._kinds = kinds
        self._owner = owner
        self._socket: socket.socket | None = None
        self._outgoing: collections.deque[bytes] = collections.deque()
        self._retry = _RETRY_FIRST
        self._stocks: dict[_StockKey, _Stock] = {}
        self._requests: dict[int, tuple[_StockKey, int]] = {}
        self._last_request = 0
        self._named: set[tuple[str, int]] = set()
        self._sweep: Timer | None = None
        self._complained = False
        self._most_ready = int(resource.getrlimit(resource.RLIMIT_NOFILE)[0] * _DESCRIPTORS)
        loop.later(1.0, self._look)

    # --- connection -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.setblocking(False)
            seqpacket.prepare(sock)
            sock.connect(str(self._path))
        except OSError as error:
            sock.close()
            if not self._complained:
                _log.warning("no agent", path=str(self._path), reason=str(error))
                self._complained = True
            self._loop.later(self._retry, self.start)
            self._retry = min(self._retry * 2, _RETRY_MOST)
            return
        self._socket = sock
        self._named.clear()
        self._loop.add(sock.fileno(), IN, self._on_events)
        held = tuple(
            api.Held(pod.uid, pod.netns_cookie, kind, _cookie(listener))
            for pod in self.pods.values()
            for kind, listener in pod.listeners.items()
        )
        self._send(api.Hello(api.Role.NODEPROXY, held=held, kinds=self._kinds, serving=self._serving))

    def serve(self) -> None:
        """From now on ready for everything that may come."""
        if not self._serving:
            self._serving = True
            if self.connected:
                self._send(api.Serve())

    def _lost(self, reason: str) -> None:
        if self._socket is None:
            return
        _log.warning("agent connection lost", reason=reason)
        self._loop.close(self._socket)
        self._socket = None
        self.connected = False
        self._outgoing.clear()
        self._requests.clear()
        if self._sweep:
            self._sweep.cancel()
        for stock in self._stocks.values():
            stock.asked = 0
        self._loop.later(self._retry, self.start)
        self._retry = min(self._retry * 2, _RETRY_MOST)

    def abort(self) -> None:
        """A message's handling failed: what it said is not known, so the agent is asked to say everything again."""
        self._lost("internal error")

    def _send(self, message: api.FromProxy) -> None:
        self._outgoing.append(api.encode(message))
        self._write()

    def _write(self) -> None:
        sock = self._socket
        if sock is None:
            return
        try:
            while self._outgoing:
                seqpacket.send(sock, self._outgoing[0])
                self._outgoing.popleft()
        except BlockingIOError:
            self._loop.modify(sock.fileno(), IN | OUT)
            return
        except OSError as error:
            self._lost(str(error))
            return
        self._loop.modify(sock.fileno(), IN)

    def _on_events(self, events: int) -> None:
        if events & OUT:
            self._write()
        for _ in range(64):
            sock = self._socket
            if sock is None:
                return
            try:
                data, fds = seqpacket.receive(sock)
            except BlockingIOError:
                return
            except (OSError, seqpacket.PacketError) as error:
                self._lost(str(error))
                return
            if not data:
                self._lost("closed")
                return
            left = list(fds)
            try:
                self._on_message(api.decode_from_agent(data), left)
            except (msgspec.DecodeError, MapError, IndexError) as error:
                self._lost(f"message not understood: {error}")
            finally:
                for fd in left:
                    os.close(fd)

    # --- messages ---------------------------------------------------------------------------------------------------

    def _on_message(self, message: api.FromAgent, fds: list[int]) -> None:
        """Descriptors that are used are taken out of ``fds``."""
        match message:
            case api.Welcome():
                self.connected = True
                self._complained = False
                self._retry = _RETRY_FIRST
                _log.info("agent connected", node=message.node, held=len(self.pods))
                for name in message.maps:
                    fd = fds.pop(0)
                    if name == "captured":
                        if self.captured is not None:
                            self.captured.close()
                        self.captured = CapturedMap(fd)
                    else:
                        os.close(fd)
                self._sweep = self._loop.later(_GRACE, self._withdraw_unnamed)
                for key in self._stocks:
                    self._fill(key)
            case api.Refused():
                _log.error("refused by the agent", reason=message.reason)
                self._retry = _RETRY_MOST
                self._lost("refused")
            case api.Enroll():
                self._enroll(message, fds)
            case api.Withdraw():
                pod_key = (message.uid, message.netns_cookie)
                if message.drain:
                    self._leave(pod_key)
                else:
                    self._withdraw(pod_key)
            case api.Known():
                self._owner.on_known()
            case api.Serving():
                self._owner.on_serving()
            case api.Drain():
                self._owner.on_drain()
            case api.Sockets():
                self._sockets(message, fds)

    def _enroll(self, message: api.Enroll, fds: list[int]) -> None:
        key = (message.uid, message.netns_cookie)
        self._named.add(key)
        pod = self.pods.get(key)
        if pod is None:
            pod = self.pods[key] = Pod(message.uid, message.netns_cookie, message)
        pod.described = message
        pod.left = False
        self._owner.on_pod(pod)
        for kind in message.listeners:
            listener = socket.socket(fileno=fds.pop(0))
            listener.setblocking(False)
            old = pod.listeners.pop(kind, None)
            if old is not None:
                self._loop.later(LINGER, functools.partial(self._loop.close, old))
            pod.listeners[kind] = listener
            self._owner.on_listener(pod, kind, listener)
        for ipv6 in {":" in address for address in pod.addresses}:
            for purpose in Purpose:
                self._fill((*key, purpose, ipv6))

    def _withdraw_unnamed(self) -> None:
        for key in [key for key, pod in self.pods.items() if key not in self._named and not pod.left]:
            _log.warning("pod is not known to the agent any more", uid=key[0])
            self._withdraw(key)

    def _leave(self, key: tuple[str, int]) -> None:
        pod = self.pods.get(key)
        if pod is None:
            return
        pod.left = True
        for listener in pod.listeners.values():
            self._loop.close(listener)
        pod.listeners.clear()
        self._owner.on_left(pod)

    def _withdraw(self, key: tuple[str, int]) -> None:
        pod = self.pods.pop(key, None)
        if pod is None:
            return
        pod.withdrawn = True
        for listener in pod.listeners.values():
            self._loop.close(listener)
        pod.listeners.clear()
        for stock_key in [known for known in self._stocks if known[:2] == key]:
            stock = self._stocks.pop(stock_key, None)
            if stock is not None:
                for sock in stock.ready:
                    sock.close()
                for waiter, timer in stock.waiters:
                    timer.cancel()
                    waiter(None)
        self._owner.on_withdraw(pod)

    # --- sockets ----------------------------------------------------------------------------------------------------

    def get_socket(self, pod: Pod, purpose: Purpose, address: str, callback: SocketWaiter) -> None:
        """Call back with an unconnected socket in the pod's namespace, maybe at once; None after :data:`PATIENCE`.

        :param address: what it is to dial, which says the family.
        """
        key = (pod.uid, pod.netns_cookie, purpose, ":" in address)
        if pod.withdrawn:
            callback(None)
            return
        stock = self._stocks.setdefault(key, _Stock(STOCK[purpose]))
        stock.taken += 1
        if stock.ready:
            sock = stock.ready.popleft()
            self._fill(key)
            callback(sock)
            return
        item: tuple[SocketWaiter, Timer]

        def too_late() -> None:
            with contextlib.suppress(ValueError):
                stock.waiters.remove(item)
                callback(None)

        item = (callback, self._loop.later(PATIENCE, too_late))
        stock.waiters.append(item)
        self._fill(key)

    def _fill(self, key: _StockKey) -> None:
        if not self.connected or key[:2] not in self.pods:
            return
        stock = self._stocks.setdefault(key, _Stock(STOCK[key[2]]))
        missing = stock.target + len(stock.waiters) - len(stock.ready) - stock.asked
        if not stock.waiters and missing * 2 < stock.target:
            return  # not one by one
        while missing > 0:
            count = min(missing, _MOST)
            missing -= count
            stock.asked += count
            self._last_request += 1
            self._requests[self._last_request] = (key, count)
            uid, cookie, purpose, ipv6 = key
            self._send(api.GetSockets(self._last_request, uid, cookie, purpose, count, ipv6))

    def _look(self) -> None:
        """Every second: stocks follow what is taken from them. Without an agent they stay, for nothing can be had back."""
        self._loop.later(1.0, self._look)
        if not self.connected:
            return
        for stock in self._stocks.values():
            stock.look()
        total = sum(stock.target for stock in self._stocks.values())
        for key, stock in self._stocks.items():
            if total > self._most_ready:
                stock.target = max(stock.least, stock.target * self._most_ready // total)
            stock.trim()
            self._fill(key)

    def _sockets(self, message: api.Sockets, fds: list[int]) -> None:
        key, count = self._requests.pop(message.id, (None, 0))
        stock = self._stocks.get(key) if key else None
        if key is None or stock is None:
            return
        stock.asked -= count
        if message.error:
            _log.warning("no sockets", uid=key[0], purpose=key[2].value, reason=message.error)
            if stock.waiters:  # Else the next one who asks will do.
                self._loop.later(0.5, lambda: self._fill(key))
        while fds:
            sock = socket.socket(fileno=fds.pop(0))
            prepare(sock)
            if stock.waiters:
                waiter, timer = stock.waiters.popleft()
                timer.cancel()
                waiter(sock)
            else:
                stock.ready.append(sock)


def _cookie(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)
