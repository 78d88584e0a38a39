"""Brings pods into the mesh that run already and never came by CNI ADD: they are older than the plugin on this node.

Owns when to look for them, and the watch over those that were found: the runtime does not know of us there, so nobody says DEL
when such a pod ends. Its oldest process does, by ending, and the controller.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from agent import processes, sandboxes
from agent.pods import Attachment, AttachmentKey, Refusal
from common import logs
from common.tasks import Tasks

_log = logs.get(__name__)

#: Seconds until what was not found is looked for again.
AGAIN = 2.0

_PREFIX = "running/"


class Candidate(NamedTuple):
    """A pod that should be in the mesh and is not attached."""

    uid: str
    namespace: str
    name: str
    addresses: tuple[str, ...]  #: at most one of each family


class Book(Protocol):
    """The node, as far as this needs it."""

    def candidates(self) -> Sequence[Candidate]: ...
    def found_running(self) -> Sequence[Attachment]:
        """Attachments of this kind that the book has."""
        ...

    def lives(self, attachment: Attachment) -> bool:
        """Whether the controller still speaks of the attached pod: without a process it may be between two containers."""
        ...

    async def attach_running(self, attachment: Attachment, netns: int) -> None: ...
    async def delete(self, key: AttachmentKey) -> None: ...


def is_found_running(attachment: Attachment) -> bool:
    """Whether no runtime knows of it, so that none will take it back."""
    return attachment.container_id.startswith(_PREFIX)


class Live:
    """See the module."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._wake = asyncio.Event()
        self._host_netns = processes.netns_inode_of("self")
        self._watched: dict[AttachmentKey, int] = {}  # pidfd
        self._tasks = Tasks()
        self._complained: frozenset[str] = frozenset()

    def changed(self) -> None:
        """There may be candidates."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await self._adopt()
            while True:
                await self._wake.wait()
                self._wake.clear()
                missing = await self._look()
                if missing:
                    asyncio.get_running_loop().call_later(AGAIN, self._wake.set)
        finally:
            await self._tasks.cancel()
            for key in list(self._watched):
                self._forget(key)

    async def _adopt(self) -> None:
        """Watch again what a predecessor found; what has ended meanwhile is removed."""
        for attachment in self._book.found_running():
            self._tasks.start(self._look_after(attachment), name=f"look after {attachment.pod_name}")

    async def _look(self) -> bool:
        """Whether some candidates have not been found."""
        candidates = {candidate.uid: candidate for candidate in self._book.candidates()}
        if not candidates:
            return False
        found = await self._find((c.uid, c.addresses) for c in candidates.values())
        for uid, sandbox in found.items():
            candidate = candidates.pop(uid)
            attachment = Attachment(
                container_id=f"{_PREFIX}{uid}",
                ifname=next((name for name in sandbox.interfaces if name != "lo"), "lo"),
                addresses=candidate.addresses,
                pod_uid=uid,
                pod_namespace=candidate.namespace,
                pod_name=candidate.name,
                netns_cookie=sandbox.cookie,
                netns_inode=sandbox.inode,
            )
            try:
                self._watch(attachment, sandbox.pid)
                await self._book.attach_running(attachment, sandbox.fd)
            except (OSError, Refusal) as error:
                self._forget(attachment.key)
                candidates[uid] = candidate
                _log.error(
                    "running pod cannot join",
                    pod=f"{candidate.namespace}/{candidate.name}",
                    reason=str(error),
                )
            finally:
                os.close(sandbox.fd)
        missing = frozenset(candidates)
        for uid in missing - self._complained:
            candidate = candidates[uid]
            _log.warning(
                "running pod is not in the mesh: no process of it is to be seen here",
                pod=f"{candidate.namespace}/{candidate.name}",
                uid=uid,
            )
        self._complained = missing
        return bool(missing)

    async def _find(self, wanted: Iterable[tuple[str, tuple[str, ...]]]) -> dict[str, sandboxes.Sandbox]:
        return await asyncio.to_thread(sandboxes.find, tuple(wanted), not_in=(self._host_netns,))

    async def _look_after(self, attachment: Attachment) -> None:
        """Watch another process of the pod, or remove the pod when it has ended.

        Not every runtime keeps a process for the sandbox (CRI-O does not): a pod whose container is restarted has none meanwhile.
        """
        while True:
            found = await self._find([(attachment.pod_uid, attachment.addresses)])
            sandbox = found.get(attachment.pod_uid)
            if sandbox is not None:
                os.close(sandbox.fd)
                if sandbox.cookie != attachment.netns_cookie:
                    break
                with contextlib.suppress(OSError):
                    self._watch(attachment, sandbox.pid)
                    return
            elif not self._book.lives(attachment):
                break
            await asyncio.sleep(AGAIN)
        try:
            await self._book.delete(attachment.key)
        except Refusal as refusal:
            _log.error("pod that has ended cannot be removed", uid=attachment.pod_uid, reason=str(refusal))

    def _watch(self, attachment: Attachment, pid: int) -> None:
        """:raises OSError: the process has ended."""
        self._forget(attachment.key)
        fd = os.pidfd_open(pid)

        def ended() -> None:
            self._forget(attachment.key)
            self._tasks.start(self._look_after(attachment), name=f"look after {attachment.pod_name}")

        self._watched[attachment.key] = fd
        asyncio.get_running_loop().add_reader(fd, ended)

    def _forget(self, key: AttachmentKey) -> None:
        fd = self._watched.pop(key, None)
        if fd is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
