"""What one client of the stream has been sent, and what to send next. No sockets, no clock.

One update is on its way at a time: while a client is busy with it, snapshots pass by, and the next update goes straight to the
newest. An update holds what changed and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

from controlplane.api import Ack, Nack, Resource, Update
from controlplane.model.snapshot import Snapshot


class Session:
    """``held`` is the version that the client says it still has in full."""

    def __init__(self, held: str = "") -> None:
        self._held = held
        # None: nothing sent on this stream yet. A key without a resource: the client has some version of it, or none.
        self._sent: dict[str, Resource | None] | None = None
        self._version = ""
        self._nonce = 0
        self._waiting = False

    def next_update(self, snapshot: Snapshot) -> Update | None:
        """The update to send now, or None while the client is busy or has everything."""
        if self._waiting or (self._sent is not None and self._version == snapshot.version):
            return None
        self._nonce += 1
        if self._sent is None and self._held == snapshot.version:
            update = Update(self._nonce, snapshot.version)
        elif self._sent is None:
            update = Update(
                self._nonce, snapshot.version, complete=True, upserts=tuple(snapshot.resources.values())
            )
        else:
            upserts, removes = difference(self._sent, snapshot.resources)
            update = Update(self._nonce, snapshot.version, upserts=upserts, removes=removes)
        self._sent = dict(snapshot.resources)
        self._version = snapshot.version
        self._waiting = True
        return update

    def answer(self, message: Ack | Nack) -> bool:
        """Take the client's answer; False if it is not for the update on its way (and is ignored)."""
        if not self._waiting or message.nonce != self._nonce:
            return False
        self._waiting = False
        if isinstance(message, Nack) and self._sent is not None:
            # What the client could not put in force goes along again with the next update. Its last good state stays
            # there meanwhile, and has to be removed when the resource is gone.
            for error in message.errors:
                self._sent[error.key] = None
        return True


def difference(
    old: Mapping[str, Resource | None], new: Mapping[str, Resource]
) -> tuple[tuple[Resource, ...], tuple[str, ...]]:
    """Upserts and removes that lead from one state to the other."""
    upserts = tuple(r for key, r in new.items() if old.get(key) != r)
    return upserts, tuple(key for key in old if key not in new)
