"""What the node knows, and what of it outlives the agent: the mesh, the numbers of identities, the book of pods.

Owns the three files and when each is written: numbers before one of them reaches the kernel, the book before an ADD is answered,
the mesh a moment behind. What follows from the state is :mod:`agent.reconciler`'s.
"""

from __future__ import annotations

import asyncio
import time

import msgspec

from agent.identities import Identities, IdentitiesError
from agent.mesh import Mesh, apply
from agent.pods import Attachment, Pods, PodsError
from agent.storage import Storage
from common import logs
from controlplane.api import ResourceError, Update, decode_update, encode

_log = logs.get(__name__)

MESH_FILE = "mesh.msgpack"
IDENTITIES_FILE = "identities.json"
PODS_FILE = "pods.json"


class State:
    """See the module. All methods belong to the event loop's thread."""

    def __init__(self, storage: Storage, *, boot: str) -> None:
        """``boot`` tells one boot of the machine from the next: pods do not outlive it."""
        self.mesh = Mesh()
        self.numbers = Identities()
        self.pods = Pods()
        self._storage = storage
        self._boot = boot
        self._unsaved = asyncio.Event()
        self._saved = self.mesh

    def apply(self, update: Update) -> tuple[ResourceError, ...]:
        """Take an update into the mesh; gives what of it is no use. :meth:`keep` writes it to disk."""
        self.mesh, errors = apply(self.mesh, update)
        self._unsaved.set()
        return errors

    def load(self, *, programmed: bool) -> None:
        """Read what a predecessor left; ``programmed``: the kernel has pods of it."""
        if (data := self._storage.read(IDENTITIES_FILE)) is not None:
            try:
                self.numbers = Identities.load(data)
            except IdentitiesError as error:
                self._storage.set_aside(IDENTITIES_FILE, str(error))
                data = None
        if data is None and programmed:
            # Numbers of a predecessor are in the kernel, and nobody knows whose they are: none of them may come again.
            self.numbers = Identities(first=int(time.time()))
        if (data := self._storage.read(MESH_FILE)) is not None:
            try:
                self.mesh, errors = apply(Mesh(), decode_update(data))
            except ValueError as error:  # msgspec's own, and a text that is no UTF-8
                self._storage.set_aside(MESH_FILE, str(error))
            else:
                for bad in errors:
                    _log.error("last good state is not all good", resource=bad.key, reason=bad.reason)
                _log.info(
                    "last good state loaded",
                    version=self.mesh.version[:12],
                    resources=len(self.mesh.resources),
                )
        if (data := self._storage.read(PODS_FILE)) is not None:
            try:
                book = msgspec.json.decode(data, type=_PodsFile)
                if book.boot == self._boot:
                    self.pods = Pods.load(bytes(book.pods))
            except (ValueError, PodsError) as error:
                self._storage.set_aside(PODS_FILE, str(error))

    def book(self, attachment: Attachment) -> None:
        """Take an attachment into the book, on disk too.

        :raises OSError: it cannot be written; the book is as it was.
        """
        before = self.pods.get(attachment.key)
        self.pods.put(attachment)
        try:
            self.save_pods()
        except OSError:
            self.pods.remove(attachment.key)
            if before is not None:
                self.pods.put(before)
            raise

    def save_pods(self) -> None:
        """:raises OSError: the book cannot be written."""
        self._storage.write(
            PODS_FILE,
            msgspec.json.encode(_PodsFile(self._boot, msgspec.Raw(self.pods.dump()))),
            outlives_boot=False,
        )

    def save_numbers(self) -> None:
        """Write the numbers if there are new ones. A number whose meaning a restart forgets must never be in the kernel.

        :raises OSError: they cannot be written.
        """
        if self.numbers.dirty:
            # After a boot there are none in the kernel.
            self._storage.write(IDENTITIES_FILE, self.numbers.dump(), outlives_boot=False)
            self.numbers.dirty = False

    async def keep(self) -> None:
        """Until cancelled, keep the last good state on disk; the file is large and may be a few changes behind, never torn."""
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            try:
                await asyncio.to_thread(self._save_mesh, self.mesh)
            except OSError as error:
                _log.error(
                    "last good state cannot be written", folder=str(self._storage.folder), reason=str(error)
                )
            await asyncio.sleep(0.2)

    def close(self) -> None:
        """Write what :meth:`keep` had not come to.

        :raises OSError: it cannot be written.
        """
        if self._saved is not self.mesh:
            self._save_mesh(self.mesh)

    @property
    def folder(self) -> str:
        """Where the files are, for a message."""
        return str(self._storage.folder)

    def _save_mesh(self, mesh: Mesh) -> None:
        self._storage.write(MESH_FILE, encode(mesh.snapshot()))
        self._saved = mesh


class _PodsFile(msgspec.Struct):
    boot: str
    pods: msgspec.Raw
