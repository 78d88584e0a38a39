"""The pods that the container runtime has attached on this node.

Owns the book of attachments, (container id, interface) by (container id, interface), and its file: a restarted agent adopts
its pods from it. Which of them are in the mesh is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec


class Refusal(Exception):
    """A CNI request that cannot be done, with the error that the runtime is to see (codes: :mod:`cni.protocol`)."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details


class AttachmentKey(NamedTuple):
    """The specification's unit (section 2, "Attachment"): one interface of one container."""

    container_id: str
    ifname: str


class Attachment(msgspec.Struct, frozen=True):
    """One attachment. ``netns_cookie`` is the namespace's name in kernel tables, ``netns_inode`` the one in /proc."""

    container_id: str
    ifname: str
    network: str = ""
    netns_path: str = ""
    addresses: tuple[str, ...] = ()
    pod_uid: str = ""
    pod_namespace: str = ""
    pod_name: str = ""
    netns_cookie: int = 0
    netns_inode: int = 0

    @property
    def key(self) -> AttachmentKey:
        return AttachmentKey(self.container_id, self.ifname)


class Sandbox(NamedTuple):
    """All attachments of one pod in one namespace, which the kernel knows as one."""

    uid: str
    netns_cookie: int
    netns_inode: int
    addresses: tuple[str, ...]
    namespace: str
    name: str


class PodsError(Exception):
    """The bytes are no book of attachments."""


class Pods:
    """The book, in the order of arrival."""

    def __init__(self, attachments: Iterable[Attachment] = ()) -> None:
        self._attachments: dict[AttachmentKey, Attachment] = {a.key: a for a in attachments}

    def get(self, key: AttachmentKey) -> Attachment | None:
        return self._attachments.get(key)

    def put(self, attachment: Attachment) -> None:
        # At the end, also when it was there before: the latest sandbox of a pod is the one that lives.
        self._attachments.pop(attachment.key, None)
        self._attachments[attachment.key] = attachment

    def remove(self, key: AttachmentKey) -> Attachment | None:
        return self._attachments.pop(key, None)

    def __len__(self) -> int:
        return len(self._attachments)

    def __iter__(self) -> Iterator[Attachment]:
        return iter(tuple(self._attachments.values()))

    def sandboxes(self) -> dict[int, Sandbox]:
        """By netns cookie, oldest first."""
        found: dict[int, list[Attachment]] = {}
        # At once, not item by item: admin threads look too.
        for attachment in tuple(self._attachments.values()):
            found.setdefault(attachment.netns_cookie, []).append(attachment)
        return {
            cookie: Sandbox(
                uid=parts[-1].pod_uid,
                netns_cookie=cookie,
                netns_inode=parts[-1].netns_inode,
                addresses=tuple(dict.fromkeys(address for part in parts for address in part.addresses)),
                namespace=parts[-1].pod_namespace,
                name=parts[-1].pod_name,
            )
            for cookie, parts in found.items()
        }

    def dump(self) -> bytes:
        return msgspec.json.encode(list(self._attachments.values()))

    @classmethod
    def load(cls, data: bytes) -> Pods:
        """:raises PodsError: the bytes are no book."""
        try:
            return cls(msgspec.json.decode(data, type=list[Attachment]))
        except ValueError as error:  # msgspec's own, and a text that is no UTF-8
            raise PodsError(str(error)) from None
