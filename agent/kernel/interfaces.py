"""The host's ends of pods' veths: which those are, the programs on them, and the table ``interfaces``.

Owns finding the host's end (from the pod's end, and back again, so that it is the pod's for certain), the two programs on it, and
their end. Where the kernel has tcx (6.6) they are attached by links that are pinned, and that nobody else removes; before, as
filters of a clsact qdisc, which live as long as the interface. Programs of others on the same interface run after ours.

Attaching a link waits until all that runs in the kernel has been seen to rest, twice some ten milliseconds, with the lock of all
network configuration. So a pod whose runtime waits for it is judged by filters first, and links take over later: while both are
there both judge, and the interface's flag lets one of them count. Until then links of others, which come later, run before them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
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

    def enrol(self, pod: Pod, netns: int, *, starting: bool = False) -> None:
        """Judge what goes to and from a pod, from now on; or change who it is.

        :param starting: nothing runs in it yet, and somebody waits: filters do it until :meth:`link`, where others have none.
        :raises OSError: its veth cannot be found, or the kernel refuses.
        """
        cookie = pod.netns_cookie
        ends = self._ends(pod, netns)
        for number, mac in ends:
            value = wire.Interface(cookie, *by_family(pod.addresses), pod.identity, pod_flags(pod), mac)
            by_filters = replace(value, flags=value.flags | wire.INTERFACE_FILTERS)
            # First who it is: a program that knows nobody drops.
            if self._has_filters(cookie, number):
                self._put(number, by_filters)
                _on(self._host, partial(self._add_filters, number))
            elif not (starting and self._begin(cookie, number, by_filters)):
                self._put(number, value)
                _on(self._host, partial(self._attach, cookie, number))
        self._drop(cookie, {end.number for end in ends})

    def _begin(self, cookie: int, index: int, value: wire.Interface) -> bool:
        """Judge by filters; False where they cannot be, or would not be the first."""
        try:
            if not _on(self._host, partial(self._is_free, cookie, index)):
                return False
            self._put(index, value)
            _on(self._host, partial(self._add_filters, index))
        except OSError:
            # A kernel may have links and no filters.
            for way, _ in _WAYS:
                self._remove_filter(index, way)
            return False
        return True

    def _remove_filter(self, index: int, way: str) -> None:
        """If it is there."""
        with contextlib.suppress(OSError):
            _on(self._host, partial(netlink.remove_filter, index, ingress=way == "from"))

    def link(self, cookie: int, netns: int) -> None:
        """Let links take over from the filters that a starting pod was given.

        :raises OSError: the kernel refuses, or the interface is gone; the filters stay.
        """
        for index, value in self._elements():
            if value.netns == cookie and value.flags & wire.INTERFACE_FILTERS:
                _on(self._host, partial(self._take_over, cookie, index, netns))
                self._put(index, replace(value, flags=value.flags & ~wire.INTERFACE_FILTERS))

    def _take_over(self, cookie: int, index: int, netns: int) -> None:
        if not _leads_to(netlink.link(index), netns):
            raise OSError(errno.ENODEV, f"interface {index} is not the pod's any more")
        self._attach(cookie, index)
        for way, _ in _WAYS:
            # Without tcx they are what stays.
            if self._pin(cookie, index, way).exists() and netlink.has_filter(index, ingress=way == "from"):
                netlink.remove_filter(index, ingress=way == "from")

    def unlinked(self) -> set[int]:
        """Cookies of pods for which :meth:`link` is to be called."""
        return {value.netns for _, value in self._elements() if value.flags & wire.INTERFACE_FILTERS}

    def _put(self, index: int, value: wire.Interface) -> None:
        data = value.pack()
        with self._table_lock:
            if self._table.lookup(_key(index)) != data:
                self._table.update(_key(index), data)

    def _get(self, index: int) -> wire.Interface | None:
        with self._table_lock:
            data = self._table.lookup(_key(index))
        return None if data is None else wire.Interface.unpack(data)

    def _has_filters(self, cookie: int, index: int) -> bool:
        known = self._get(index)
        return known is not None and known.netns == cookie and bool(known.flags & wire.INTERFACE_FILTERS)

    def _is_free(self, cookie: int, index: int) -> bool:
        """Whether nobody has a program on an interface, ourselves included; links run before filters."""
        return (
            not any(self._pin(cookie, index, way).exists() for way, _ in _WAYS)
            and not any(links.has_tcx(index, attach_type) for _, attach_type in _WAYS)
            and netlink.make_room_for_filters(index)
        )

    def _pin(self, cookie: int, index: int, way: str) -> Path:
        return self._links / f"{cookie}_{index}_{way}"

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

    def _add_filters(self, index: int) -> None:
        for way, _ in _WAYS:
            self._add_filter(index, way)

    def _add_filter(self, index: int, way: str) -> None:
        program = links.open_pin(str(self._programs[way]))
        try:
            netlink.add_filter(index, program, ingress=way == "from")
        finally:
            os.close(program)

    def _attach(self, cookie: int, index: int) -> None:
        for way, attach_type in _WAYS:
            path = self._pin(cookie, index, way)
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
        # Of an agent that ended between the two steps of pin(): the kernel takes a program once.
        _end(Path(links.unfinished(str(path))))
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
                if value.flags & wire.INTERFACE_FILTERS or not self._pin(value.netns, index, way).exists():
                    _on(self._host, partial(self._renew, index, way))
                else:
                    # Of a version that did not know of those.
                    self._remove_filter(index, way)

    def _renew(self, index: int, way: str) -> None:
        if netlink.has_filter(index, ingress=way == "from"):
            self._add_filter(index, way)

    def remove(self, cookie: int) -> None:
        """Judge nothing of that pod any more; its interfaces may be gone."""
        self._drop(cookie, set())

    def _drop(self, cookie: int, kept: set[int]) -> None:
        """Forget the pod's interfaces but those."""
        for index, value in self._elements():
            if value.netns == cookie and index not in kept:
                for way, _ in _WAYS:
                    path = self._pin(cookie, index, way)
                    _end(Path(links.unfinished(str(path))))
                    _end(path)
                    self._remove_filter(index, way)
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
            known = self._get(end.number)
            if known is None or known.netns != cookie:
                found.append(f"interface {end.number} is not the pod's in the kernel's tables")
            elif (
                known.address4,
                known.address6,
                known.identity,
                known.flags & ~wire.INTERFACE_FILTERS,
            ) != (
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
        path = self._pin(cookie, index, way)
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


def _end(path: Path) -> None:
    """Detach and unpin a link, if it is there."""
    if path.exists():
        link = links.open_pin(str(path))
        try:
            # At once: what only is unpinned runs on for a moment. Of an interface that is gone it is done.
            with contextlib.suppress(links.LinkError):
                links.detach(link)
        finally:
            os.close(link)
        path.unlink()


def _key(index: int) -> bytes:
    return struct.pack("=I", index)
