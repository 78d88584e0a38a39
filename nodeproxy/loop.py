"""The data loop: one thread, one epoll, timers, and work posted by other threads.

Owns readiness and time. Handlers are called with the epoll event mask; whoever has written into an HTTP/2 connection puts it
on :attr:`Loop.dirty`, and all such connections are flushed once at the end of the turn: many streams, one TLS write.

Sockets are closed through :meth:`Loop.close`, which waits for the end of the turn: so a descriptor number is never reused
while events of its former owner are still in the batch.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

from common import logs
from common.addresses import end_of

_log = logs.get(__name__)

Handler = Callable[[int], None]
IN = select.EPOLLIN
#: Connections accepted in one turn from one listener, and seconds without after an error.
_ACCEPTS = 64
_ACCEPT_PAUSE = 0.1
#: How often a turn looks for more before it flushes. What came meanwhile goes out in the same TLS record, and the peer is
#: woken once for all of it: a tenth less work for each request under load, a microsecond more without.
_LOOKS = 4
#: Seconds that a destination has to answer somebody who has closed: only a unix socket tells at once that nobody is there to
#: read it, where an application that never says anything would hold its stream for ever.
ORPHAN = 60.0
#: Size of the buffer that all handlers receive into.
BUFFER = 64 * 1024
OUT = select.EPOLLOUT
ERROR = select.EPOLLERR
BROKEN = ERROR | select.EPOLLHUP


class Flushable(Protocol):
    def flush(self) -> None: ...


class Timer:
    """A call to come; :meth:`cancel` may be called at any time."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    def __init__(self) -> None:
        self.now = time.monotonic()  #: seconds, of the current turn
        self.dirty: list[Flushable] = []
        self.buffer = bytearray(BUFFER)  #: what a handler has just received, until it returns
        self.view = memoryview(self.buffer)
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._closing: list[socket.socket] = []
        self._posted: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._running = False
        self.add(self._wake, IN, self._on_wake)

    def add(self, fd: int, events: int, handler: Handler) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def handle(self, fd: int, handler: Handler) -> None:
        """Give a descriptor that is registered to another handler."""
        self._handlers[fd] = handler

    def remove(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def close(self, sock: socket.socket) -> None:
        """Forget a socket now and close it at the end of the turn."""
        fd = sock.fileno()
        if fd >= 0:
            self.remove(fd)
            self._closing.append(sock)

    def listen(self, listener: socket.socket, arrived: Callable[[socket.socket, Any], None]) -> None:
        """Accept from a non-blocking listener until it is closed; ``arrived`` gets the socket and the peer's :func:`end_of`."""

        def accept(_events: int) -> None:
            for _ in range(_ACCEPTS):
                try:
                    sock, peer = listener.accept()
                except BlockingIOError:
                    return
                except ConnectionAbortedError:
                    continue
                except OSError as error:
                    # Out of descriptors, most likely: it would be told again at once, and for ever.
                    _log.error("cannot accept", listener=listener.getsockname(), reason=str(error))
                    self.remove(listener.fileno())
                    self.later(_ACCEPT_PAUSE, again)
                    return
                prepare(sock)
                try:
                    arrived(sock, end_of(peer))
                except Exception:  # a bug of ours: it ends this connection, never the listener
                    _log.exception("a connection could not be taken")
                    reset(self, sock)

        def again() -> None:
            if listener.fileno() >= 0:
                self.add(listener.fileno(), IN, accept)

        again()

    def later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call back in ``delay`` seconds."""
        timer = Timer(self.now + delay, callback)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def post(self, callback: Callable[[], None]) -> None:
        """Call back on the loop's thread; the only method that other threads may use (with :meth:`stop`)."""
        self._posted.append(callback)
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        self.post(self._stop)

    def _stop(self) -> None:
        self._running = False

    def _on_wake(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        for _ in range(len(self._posted)):
            self._guard(self._posted.popleft())

    def _guard(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            _log.exception("a callback failed")

    def run(self) -> None:
        """Run until :meth:`stop`."""
        self._running = True
        while self._running:
            self.turn()

    def turn(self, limit: float = 60.0) -> None:
        """Wait for something (at most ``limit`` seconds), handle it, flush."""
        timers = self._timers
        timeout = limit
        if timers:
            timeout = max(0.0, min(timeout, timers[0][0] - time.monotonic()))
        if self._closing or self.dirty:
            timeout = 0.0
        poll = self._epoll.poll
        events = poll(timeout, 512)
        self.now = now = time.monotonic()
        handlers = self._handlers
        looks = _LOOKS
        while events:
            for fd, mask in events:
                handler = handlers.get(fd)
                if handler is not None:
                    try:
                        handler(mask)
                    except Exception:
                        self._failed(fd, handler)
            looks -= 1
            if not looks or not self.dirty:
                break
            events = poll(0, 512)
        while timers and timers[0][0] <= now:
            callback = heapq.heappop(timers)[2].callback
            if callback is not None:
                self._guard(callback)
        self._flush()
        if self._closing:
            for sock in self._closing:
                sock.close()
            self._closing.clear()

    def _flush(self) -> None:
        # A flush may make others dirty (a stream that goes on), but never for ever: what they put there waits for the next turn.
        dirty = self.dirty
        if dirty:
            self.dirty = []
            for item in dirty:
                self._guard(item.flush)

    def _failed(self, fd: int, handler: Handler) -> None:
        """A bug of ours: it ends the one connection it hit, never the process."""
        _log.exception("a handler failed")
        owner = getattr(handler, "__self__", None)
        abort = getattr(owner, "abort", None)
        if abort is not None:
            self._guard(abort)
        else:
            self.remove(fd)

    def shutdown(self) -> None:
        """Release the loop's own descriptors (after :meth:`run`)."""
        for sock in self._closing:
            sock.close()
        self._epoll.close()
        os.close(self._wake)


def prepare(sock: socket.socket) -> None:
    """What every TCP socket of the data path has."""
    sock.setblocking(False)
    with contextlib.suppress(OSError):  # not TCP: the unix socket of handed-over streams
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def reset(loop: Loop, sock: socket.socket) -> None:
    """Close with a reset, so that the peer never takes a broken connection for a complete one."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    loop.close(sock)


_LINGER_ZERO = b"\x01\x00\x00\x00\x00\x00\x00\x00"
