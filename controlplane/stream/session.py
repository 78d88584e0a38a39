"""What one client of the stream has been sent, and what to send next. No sockets, no clock.

One update is on its way at a time: while a client is busy with it, snapshots pass by, and the next update goes straight to the
newest. An update holds what changed and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from controlplane.api import API_NETWORK, API_VERSION, Ack, Nack, Resource, Update, pack, resource_key
from controlplane.model.snapshot import Snapshot
from controlplane.stream import older

_encoder = msgspec.msgpack.Encoder()
_NOTHING = msgspec.Raw(_encoder.encode(()))
#: Bytes from which upserts are packed for those who take that.
_LARGE = 64 << 10


class Delta(NamedTuple):
    """From one snapshot to another."""

    upserts: tuple[Resource, ...]
    removes: tuple[str, ...]


class _Encoded(msgspec.Struct, frozen=True, tag="update"):
    """An Update of which the large parts are encoded already; the bytes are the same."""

    nonce: int
    version: str
    complete: bool
    upserts: msgspec.Raw
    removes: tuple[str, ...]
    packed: bytes = b""


class Updates:
    """What leads to the newest snapshot, found and encoded once for all sessions."""

    def __init__(self) -> None:
        self._target = ""
        self._deltas: dict[tuple[str, bool], Delta] = {}
        self._whole: dict[bool, tuple[Resource, ...]] = {}
        self._encoded: dict[int, tuple[tuple[Resource, ...], msgspec.Raw]] = {}
        self._packed: dict[int, bytes] = {}
        self._messages: dict[tuple[int, str, int, bool], bytes] = {}

    def between(self, old: Snapshot, new: Snapshot, network: bool = True) -> Delta:
        """``network``: for a client that knows :data:`controlplane.api.API_NETWORK`."""
        self._aim(new)
        found = self._deltas.get((old.version, network))
        if found is None:
            found = difference(old.resources, new.resources)
            if not network:
                found = Delta(older.resources(found.upserts), older.keys(found.removes))
            self._deltas[old.version, network] = found
        return found

    def whole(self, snapshot: Snapshot, network: bool = True) -> tuple[Resource, ...]:
        """``network``: as of :meth:`between`."""
        self._aim(snapshot)
        found = self._whole.get(network)
        if found is None:
            found = tuple(snapshot.resources.values())
            found = self._whole[network] = found if network else older.resources(found)
        return found

    def encode(self, update: Update, packed: bool = False) -> bytes:
        """The update's bytes; ``packed`` if that may be. Upserts that are sent to many are encoded for the first of them."""
        if older.snapshot_of(update.version) != self._target:
            return _encoder.encode(update)
        item = id(update.upserts)
        key = (update.nonce, update.version, item, packed)
        if key in self._messages:
            return self._messages[key]
        # The tuple is kept with it: an id is one object's only while it lives.
        found = self._encoded.get(item)
        if found is None:
            found = update.upserts, msgspec.Raw(_encoder.encode(update.upserts))
            self._encoded[item] = found
        upserts, small = found[1], b""
        if packed and len(bytes(upserts)) >= _LARGE:
            if item not in self._packed:
                self._packed[item] = pack(bytes(upserts))
            upserts, small = _NOTHING, self._packed[item]
        data = _encoder.encode(
            _Encoded(update.nonce, update.version, update.complete, upserts, update.removes, small)
        )
        if update.complete:
            # The first on every stream, and perhaps megabytes: so these are the same bytes for all.
            self._messages[key] = data
        return data

    def _aim(self, snapshot: Snapshot) -> None:
        if snapshot.version != self._target:
            self._target = snapshot.version
            self._deltas.clear()
            self._encoded.clear()
            self._packed.clear()
            self._messages.clear()
            self._whole.clear()


class Session:
    """``held`` is the version that the client says it still has in full; ``updates`` may be shared with other sessions.

    ``api`` is the client's version of the protocol.
    """

    def __init__(self, held: str = "", updates: Updates | None = None, api: int = API_VERSION) -> None:
        self._held = held
        self._api = api
        self._network = api >= API_NETWORK
        self._updates = updates or Updates()
        self._sent: Snapshot | None = None  # None: nothing sent on this stream yet
        self._refused: set[str] = set()  # of these the client has some version, or none
        self._nonce = 0
        self._waiting = False

    def next_update(self, snapshot: Snapshot) -> Update | None:
        """The update to send now, or None while the client is busy or has everything."""
        if self._waiting or (self._sent is not None and self._sent.version == snapshot.version):
            return None
        self._nonce += 1
        version = older.version_for(self._api, snapshot.version)
        if self._sent is None and self._held == version:
            update = Update(self._nonce, version)
        elif self._sent is None:
            update = Update(
                self._nonce,
                version,
                complete=True,
                upserts=self._updates.whole(snapshot, self._network),
            )
        else:
            upserts, removes = self._updates.between(self._sent, snapshot, self._network)
            if self._refused:
                upserts, removes = self._with_refused(snapshot, upserts, removes)
            update = Update(self._nonce, version, upserts=upserts, removes=removes)
        self._sent = snapshot
        self._refused = set()
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
            self._refused = {error.key for error in message.errors}
        return True

    def _with_refused(
        self, snapshot: Snapshot, upserts: tuple[Resource, ...], removes: tuple[str, ...]
    ) -> Delta:
        there = snapshot.resources
        again = [there[key] for key in sorted(self._refused) if key in there]
        again = again if self._network else list(older.resources(again))
        gone = [key for key in sorted(self._refused) if key not in there and key not in removes]
        known = {resource_key(r) for r in upserts}
        return Delta((*upserts, *(r for r in again if resource_key(r) not in known)), (*removes, *gone))


def difference(old: Mapping[str, Resource], new: Mapping[str, Resource]) -> Delta:
    """What leads from one state to the other. What did not change is mostly the same object, which is told fast."""
    upserts = tuple(r for key, r in new.items() if (o := old.get(key)) is not r and o != r)
    return Delta(upserts, tuple(key for key in old if key not in new))
