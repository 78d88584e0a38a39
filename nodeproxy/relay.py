"""A tunnel at work: an application's socket on one side, a stream of a link on the other.

Owns the application's socket from the moment the tunnel is open, its half-closes and its back-pressure. This is the hot path:
a turn's reads go straight into the link's output buffer, and payload that arrived is written from the receive buffer.

``read`` and ``written`` are the bytes that came from and went to the application, exactly.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from nodeproxy import loop as loops
from nodeproxy.h2frames import HEADER_SIZE, Code
from nodeproxy.h2sending import Stream
from nodeproxy.link import Link
from nodeproxy.loop import BROKEN, ERROR, IN, OUT, Loop, reset

#: Frames read from one application in one turn, while they come full.
FRAMES = 4
_SHUT_WR = socket.SHUT_WR


class Relay:
    __slots__ = (
        "_core", "_ended", "_eof", "_fd", "_mask", "_pending", "_registered", "closed", "done", "link", "loop", "read",
        "sock", "stream", "written",
    )  # fmt: skip

    def __init__(
        self, loop: Loop, link: Link, stream: Stream, sock: socket.socket, done: Callable[[Relay, str], None]
    ) -> None:
        """:param done: called once, with an empty reason for an orderly end."""
        self.loop = loop
        self.link = link
        self.stream = stream
        self.sock = sock
        self.done = done
        self.read = 0
        self.written = 0
        self.closed = False
        self._core = link.core
        self._fd = sock.fileno()
        self._pending = bytearray()
        self._eof = False  #: the application sends no more
        self._ended = False  #: the peer sends no more
        self._mask = IN
        self._registered = True
        stream.owner = self
        loop.add(self._fd, IN, self.on_events)

    # --- application to stream ----------------------------------------------------------------------------------

    def on_events(self, events: int) -> None:
        if events & BROKEN and not self._survives(events):
            return
        if events & IN:
            core = self._core
            stream = self.stream
            for _ in range(FRAMES):
                room = core.room(stream)
                if not room:
                    self._wait_for_room()
                    break
                at = core.tail + HEADER_SIZE
                try:
                    count = self.sock.recv_into(core.out_view[at : at + room])
                except BlockingIOError:
                    break
                except OSError:
                    self._application_reset()
                    return
                if not count:
                    self._application_ended()
                    break
                core.commit(stream, count)
                self.read += count
                link = self.link
                if not link.dirty:
                    link.dirty = True
                    self.loop.dirty.append(link)
                if count < room:
                    break
        if events & OUT and not self.closed:
            self._write()

    def _survives(self, events: int) -> bool:
        if not events & ERROR:  # both directions are shut, which is no error
            if self._mask & IN:
                return True
            # Nothing can be masked in epoll but by leaving it: come back when there is room to read the rest.
            if self._registered:
                self._registered = False
                self.loop.remove(self._fd)
                if self._eof:
                    self.loop.later(loops.ORPHAN, self._orphaned)
            return bool(self._pending)
        self._application_reset()
        return False

    def _orphaned(self) -> None:
        self.abort("nobody is there for an answer", Code.CANCEL)

    def _wait_for_room(self) -> None:
        self._set(self._mask & ~IN)
        if not self.stream.starved:
            self.link.pause(self)

    def resume(self) -> None:
        """There may be room in the connection."""
        if not self.closed and not self._eof:
            self._set(self._mask | IN)

    on_window = resume

    def _application_ended(self) -> None:
        self._eof = True
        self._set(self._mask & ~IN)
        self._core.end(self.stream)
        self.link.mark()
        self._finish_if_done()

    def _application_reset(self) -> None:
        if not self.closed:
            self.link.reset(self.stream, Code.CONNECT_ERROR)
            self._close("application reset")

    # --- stream to application ----------------------------------------------------------------------------------

    def on_data(self, data: memoryview) -> None:
        if self.closed:
            return
        if self._pending:
            self._pending += data
            return
        size = len(data)
        try:
            count = self.sock.send(data)
        except BlockingIOError:
            count = 0
        except OSError:
            self._application_reset()
            return
        self.written += count
        if count < size:
            self._pending += data[count:]
            self._set(self._mask | OUT)
        self._core.consumed(self.stream, count)

    def _write(self) -> None:
        pending = self._pending
        if pending:
            try:
                count = self.sock.send(pending)
            except BlockingIOError:
                return
            except OSError:
                self._application_reset()
                return
            del pending[:count]
            self.written += count
            self._core.consumed(self.stream, count)
            self.link.mark()
        if not pending:
            self._set(self._mask & ~OUT)
            if self._ended:
                self._shut()

    def on_end(self) -> None:
        self._ended = True
        if not self._pending and not self.closed:
            self._shut()

    def _shut(self) -> None:
        try:
            self.sock.shutdown(_SHUT_WR)
        except OSError:
            self._application_reset()
            return
        self._finish_if_done()

    # --- end ----------------------------------------------------------------------------------------------------

    def on_response(self, status: int) -> None:
        """A second response cannot come (the core refuses it)."""

    def on_reset(self, code: Code) -> None:
        if not self.closed:
            self._close(f"stream reset: {code.name}")

    def abort(self, reason: str = "internal error", code: Code = Code.INTERNAL_ERROR) -> None:
        """End both sides at once."""
        if not self.closed:
            self.link.reset(self.stream, code)
            self._close(reason)

    def _finish_if_done(self) -> None:
        if self._eof and self._ended and not self._pending:
            self._close("")

    def _close(self, reason: str) -> None:
        self.closed = True
        self.link.paused.pop(self, None)
        self._pending.clear()
        if reason:
            reset(self.loop, self.sock)
        else:
            self.loop.close(self.sock)
        self.done(self, reason)
        self.link.stream_done()

    def _set(self, mask: int) -> None:
        if not self._registered:
            self._registered = True
            self._mask = mask
            self.loop.add(self._fd, mask, self.on_events)
        elif mask != self._mask:
            self._mask = mask
            self.loop.modify(self._fd, mask)
