"""The host's ends of pods' veths: which those are, the programs on them, and the table ``interfaces``.

Owns finding the host's end (from the pod's end, and back again, so that it is the pod's for certain), the two programs on it, and
their end. Where the kernel has tcx (6.6) they are attached by links that are pinned; before, as filters of a clsact qdisc, which
live as long as the interface. Programs of others on the same interface run after ours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from agent.kernel import namespace, netlink
from agent.kernel.errors import KernelError, NoVethError
from agent.kernel.model import Pod
from agent.kernel.pods import by_family, pod_flags
from bpf import links, wire
from bpf.maps import Map

T = TypeVar("T")

_WAYS = (("from", links.TCX_INGRESS), ("to", links.TCX_EGRESS))


class End(NamedTuple):
    """The host's end of a pod's veth, by its index, and the hardware address of the pod's own."""

    number: int
    mac: bytes


def find(netns: int, host: int | None, addresses: tuple[str, ...]) -> list[End]:
    """The host's end of each veth that has one of the pod's addresses at its other end.

    :raises NoVethError: there is none.
    :raises OSError: a namespace cannot be entered.
    """
    wanted = {wire.canonical(address) for address in addresses}

    def in_pod() -> list[netlink.Veth]:
        indices = {index for address, index in netlink.addresses() if wire.canonical(address) in wanted}
        return [netlink.link(index) for index in sorted(indices)]

    def on_host(own: netlink.Veth) -> End | None:
        try:
            end = netlink.link(own.peer)
        except OSError:
            return None
        # Indices of two namespaces may be equal by chance: it has to point back.
        if end.peer != own.number or not _leads_to(end, netns):
            return None
        return End(own.peer, own.mac)

    def ends() -> list[End]:
        return [end for own in of_pod if own.peer and (end := on_host(own)) is not None]

    of_pod = namespace.inside(netns, in_pod)
    found = _on(host, ends)
    if not found:
        raise NoVethError(wanted)
    return found


def _leads_to(end: netlink.Veth, netns: int) -> bool:
    """Whether the other end of an interface of this namespace is in that one. -1 is this one, and what has no number here."""
    return end.peer_namespace != -1 and end.peer_namespace == netlink.namespace_number(netns)


def _on(host: int | None, work: Callable[[], T]) -> T:
    return work() if host is None else namespace.inside(host, work)


class Interfaces:
    """See the module."""

    def __init__(self, folder: Path, table: Map, host: int | None) -> None:
        self._links = folder / "veth"
        self._programs = {way: folder / f"program_{way}_pod" for way, _ in _WAYS}
        self._table = table
        #: Pods are enrolled and looked at by several threads at once, and lookups share a buffer.
        self._table_lock = threading.Lock()
        self._host = host

    def enrol(self, pod: Pod, netns: int) -> None:
        """Judge what goes to and from a pod, from now on; or change who it is.

        :raises OSError: its veth cannot be found, or the kernel refuses.
        """
        cookie = pod.netns_cookie
        ends = self._ends(pod, netns)
        for end in ends:
            value = wire.Interface(
                cookie, *by_family(pod.addresses), pod.identity, pod_flags(pod), end.mac
            ).pack()
            # First who it is: a program that knows nobody drops.
            with self._table_lock:
                if self._table.lookup(_key(end.number)) != value:
                    self._table.update(_key(end.number), value)
        for end in ends:
            _on(self._host, lambda index=end.number: self._attach(cookie, index))  # type: ignore[misc]
        self._drop(cookie, {end.number for end in ends})

    def _ends(self, pod: Pod, netns: int) -> list[End]:
        """As :func:`find` says; of a pod that has lost its addresses those that it had, as it may take them again."""
        try:
            return find(netns, self._host, pod.addresses)
        except NoVethError:
            if known := _on(self._host, lambda: self._known(pod.netns_cookie, netns)):
                return known
            raise

    def _known(self, cookie: int, netns: int) -> list[End]:
        found = []
        for index, value in self._elements():
            if value.netns == cookie:
                with contextlib.suppress(OSError):
                    if _leads_to(netlink.link(index), netns):
                        found.append(End(index, value.mac))
        return found

    def _attach(self, cookie: int, index: int) -> None:
        for way, attach_type in _WAYS:
            path = self._links / f"{cookie}_{index}_{way}"
            if path.exists():
                link = links.open_pin(str(path))
                try:
                    if links.link_info(link).where == index:
                        continue
                finally:
                    os.close(link)
            program = links.open_pin(str(self._programs[way]))
            try:
                self._attach_one(path, program, index, way, attach_type)
            finally:
                os.close(program)

    def _attach_one(self, path: Path, program: int, index: int, way: str, attach_type: int) -> None:
        try:
            link = links.attach_tcx(program, index, attach_type)
        except links.LinkError as error:
            if error.errno != errno.EINVAL:
                raise
            # A kernel before tcx. Its filter needs no pin: it stays when this process ends.
            netlink.add_filter(index, program, ingress=way == "from")
            return
        try:
            links.pin(link, str(path))
        finally:
            os.close(link)

    def renew(self) -> None:
        """Let filters run the programs of now. Links do by themselves: the loader replaces what they run.

        :raises OSError: the kernel refuses.
        """
        for index, value in self._elements():
            for way, _ in _WAYS:
                if not (self._links / f"{value.netns}_{index}_{way}").exists():
                    _on(self._host, lambda index=index, way=way: self._renew(index, way))  # type: ignore[misc]

    def _renew(self, index: int, way: str) -> None:
        if not netlink.has_filter(index, ingress=way == "from"):
            return
        program = links.open_pin(str(self._programs[way]))
        try:
            netlink.add_filter(index, program, ingress=way == "from")
        finally:
            os.close(program)

    def remove(self, cookie: int) -> None:
        """Judge nothing of that pod any more; its interfaces may be gone."""
        self._drop(cookie, set())

    def _drop(self, cookie: int, kept: set[int]) -> None:
        """Forget the pod's interfaces but those."""
        for index, value in self._elements():
            if value.netns == cookie and index not in kept:
                for way, _ in _WAYS:
                    path = self._links / f"{cookie}_{index}_{way}"
                    if path.exists():
                        link = links.open_pin(str(path))
                        try:
                            # At once: what only is unpinned runs on for a moment. Of an interface that is gone it is done.
                            with contextlib.suppress(links.LinkError):
                                links.detach(link)
                        finally:
                            os.close(link)
                        path.unlink()
                    else:
                        with contextlib.suppress(OSError):
                            _on(
                                self._host,
                                lambda index=index, way=way: netlink.remove_filter(  # type: ignore[misc]
                                    index, ingress=way == "from"
                                ),
                            )
                # Behind the programs: one that knows nobody would drop.
                self._table.delete(_key(index))

    def missing(self, pod: Pod, netns: int) -> list[str]:
        """What is not as :meth:`enrol` made it, in words."""
        cookie = pod.netns_cookie
        try:
            ends = self._ends(pod, netns)
        except (KernelError, OSError) as error:
            return [str(error)]
        found = []
        for end in ends:
            with self._table_lock:
                value = self._table.lookup(_key(end.number))
            known = None if value is None else wire.Interface.unpack(value)
            if known is None or known.netns != cookie:
                found.append(f"interface {end.number} is not the pod's in the kernel's tables")
            elif (known.address4, known.address6, known.identity, known.flags) != (
                *by_family(pod.addresses),
                pod.identity,
                pod_flags(pod),
            ):
                found.append(
                    f"interface {end.number} has another address, identity or stage in the kernel's tables"
                )
            for way, _ in _WAYS:
                if not self._is_attached(cookie, end.number, way):
                    found.append(f"no program on interface {end.number} ({way} the pod)")
        return found

    def _is_attached(self, cookie: int, index: int, way: str) -> bool:
        path = self._links / f"{cookie}_{index}_{way}"
        if not path.exists():
            return _on(self._host, lambda: netlink.has_filter(index, ingress=way == "from"))
        link = links.open_pin(str(path))
        try:
            return links.link_info(link).where == index
        finally:
            os.close(link)

    def _elements(self) -> Iterator[tuple[int, wire.Interface]]:
        for key, value in self._table.items():
            yield struct.unpack("=I", key)[0], wire.Interface.unpack(value)


def _key(index: int) -> bytes:
    return struct.pack("=I", index)
