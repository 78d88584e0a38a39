"""Two sockets joined: plain legs, where a stream does not go through HBONE.

Owns both sockets, half-closes and back-pressure: what one side has not taken is at most one buffer, and meanwhile the other
side is not read.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from nodeproxy import loop as loops
from nodeproxy.loop import BROKEN, ERROR, IN, OUT, Loop, reset


class _Side:
    """What is read from ``sock`` goes to ``other``."""

    def __init__(self, pair: Pair, sock: socket.socket) -> None:
        self.pair = pair
        self.sock = sock
        self.fd = sock.fileno()
        self.other: _Side
        self.pending = bytearray()  #: for this side's socket
        self.eof = False  #: this side sends no more
        self.shut = False
        self.mask = 0
        self.registered = False

    def abort(self) -> None:
        self.pair.close("internal error")

    def want(self) -> None:
        """Readiness to wait for, from the state of both sides."""
        mask = 0
        if not self.eof and not self.other.pending:
            mask |= IN
        if self.pending:
            mask |= OUT
        loop = self.pair.loop
        if mask == self.mask and self.registered:
            return
        self.mask = mask
        if self.registered:
            loop.modify(self.fd, mask)
        else:
            self.registered = True
            loop.add(self.fd, mask, self.on_events)

    def on_events(self, events: int) -> None:
        pair = self.pair
        if events & BROKEN and not self.mask:
            # Hung up while it is not read (nothing can be masked in epoll but by leaving it): come back when its other
            # side has taken what it has. At its end that is no error: a unix socket says so when its peer has closed.
            self.registered = False
            pair.loop.remove(self.fd)
            if self.eof and events & ERROR:
                pair.close("reset")
            elif self.eof:
                pair.loop.later(loops.ORPHAN, lambda: pair.close("nobody is there for an answer"))
            return
        if events & OUT and self.pending:
            try:
                count = self.sock.send(self.pending)
            except BlockingIOError:
                count = 0
            except OSError:
                pair.close("reset")
                return
            del self.pending[:count]
            if not self.pending:
                self._end_if_over()
                self.other.want()
            self.want()
        if events & (IN | BROKEN) and self.mask & IN and not pair.closed:
            self._read()

    def _read(self) -> None:
        pair = self.pair
        other = self.other
        try:
            count = self.sock.recv_into(pair.loop.buffer)
        except BlockingIOError:
            return
        except OSError:
            pair.close("reset")
            return
        if not count:
            self.eof = True
            other._end_if_over()
            self.want()
            return
        try:
            sent = other.sock.send(pair.loop.view[:count])
        except BlockingIOError:
            sent = 0
        except OSError:
            pair.close("reset")
            return
        if sent < count:
            other.pending += pair.loop.view[sent:count]
            other.want()
            self.want()

    def _end_if_over(self) -> None:
        """Pass the other side's end on, once everything before it is written."""
        if self.other.eof and not self.pending and not self.shut:
            self.shut = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.pair.close("reset")
                return
            if self.other.shut:
                self.pair.close("")


class Pair:
    def __init__(
        self,
        loop: Loop,
        one: socket.socket,
        two: socket.socket,
        done: Callable[[Pair, str], None],
        early: bytes = b"",
    ) -> None:
        """Join two connected sockets.

        :param early: already read from ``one``, for ``two``.
        :param done: called once, with an empty reason for an orderly end.
        """
        self.loop = loop
        self.closed = False
        self._done = done
        self._one = _Side(self, one)
        self._two = _Side(self, two)
        self._one.other, self._two.other = self._two, self._one
        self._two.pending += early
        self._one.want()
        self._two.want()

    def close(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        for side in (self._one, self._two):
            if reason:
                reset(self.loop, side.sock)
            else:
                self.loop.close(side.sock)
        self._done(self, reason)
