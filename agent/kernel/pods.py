"""Pods and peers: who is in the mesh on this node, and who has which address.

Owns ``pods``, ``peers`` and the sk_lookup links in pods' namespaces. A pod given to :meth:`Pods.add` has its address
for certain; what others say of that address counts again when the pod is gone.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from agent.kernel import namespace
from agent.kernel.errors import KernelError
from agent.kernel.model import Peer, Pod
from bpf import links, wire
from bpf.maps import Map

_TUPLE_SIZE = wire.Tuple.LAYOUT.size
_COOKIE_SIZE = 8
_LISTENER_PORTS = (wire.PORT_OUTBOUND, wire.PORT_OUTBOUND_L7, wire.PORT_HBONE)


def netns_key(cookie: int) -> bytes:
    return struct.pack("=Q", cookie)


def address_key(address: str) -> bytes:
    """:raises ValueError: no IP address."""
    return wire.pack_address(address)


def by_family(addresses: tuple[str, ...]) -> tuple[str, str]:
    """The IPv4 and the IPv6 address of a pod; empty where it has none.

    :raises ValueError: none at all, two of one family, or no address.
    """
    found = {4: "", 6: ""}
    for address in addresses:
        text = wire.canonical(address)
        family = 6 if ":" in text else 4
        if found[family]:
            raise ValueError(f"two addresses of one family: {found[family]} and {text}")
        found[family] = text
    if not addresses:
        raise ValueError("no address")
    return found[4], found[6]


def pod_flags(pod: Pod) -> int:
    """As the kernel has them."""
    flags = (wire.POD_PASSING if pod.passing else 0) | (wire.POD_OPEN if pod.open else 0)
    return flags | (0 if pod.splice else wire.POD_NO_SPLICE)


class Pods:
    """See the module."""

    def __init__(self, folder: Path, tables: dict[str, Map]) -> None:
        self._links = folder / "netns"
        self._program = folder / "program_sk_lookup"
        self._pods = tables["pods"]
        self._peers = tables["peers"]
        self._policies = tables["policies"]
        self._listeners = tables["listeners"]
        self._connecting = tables["connecting"]
        self._captured = tables["captured"]
        self._recent = tables["recent"]
        self._shares = tables["shares"]

    def all(self) -> dict[int, Pod]:
        found: dict[int, Pod] = {}
        for key, value in self._pods.items():
            (cookie,) = struct.unpack("=Q", key)
            pod = wire.Pod.unpack(value)
            found[cookie] = _pod(cookie, pod)
        return found

    def get(self, cookie: int) -> Pod | None:
        value = self._pods.lookup(netns_key(cookie))
        if value is None:
            return None
        return _pod(cookie, wire.Pod.unpack(value))

    def add(self, pod: Pod, netns: int) -> None:
        """:raises OSError: nothing of it is left then, unless the pod was there before."""
        address4, address6 = by_family(pod.addresses)
        if not wire.IDENTITY_FIRST <= pod.identity < wire.POLICY_GENERATION:
            raise ValueError(f"pod {pod.netns_cookie}: identity {pod.identity} is no workload's")
        if (found := namespace.cookie(netns)) != pod.netns_cookie:
            raise KernelError(f"the namespace has the cookie {found}, not {pod.netns_cookie}")
        known = self.get(pod.netns_cookie)
        if known is not None:
            self._release(pod.netns_cookie, set(known.addresses) - {address4, address6})
        try:
            namespace.prepare(netns)
            if known is None and not pod.open:
                self._guard(pod.netns_cookie, netns)
            if self._shares.lookup(netns_key(pod.netns_cookie)) is None:
                self._shares.update(netns_key(pod.netns_cookie), wire.Share().pack())
            # First it can be reached (by nobody, until it has a policy), then it is captured.
            peer_flags = wire.PEER_LOCAL | wire.PEER_ENROLLED
            if pod.passing or pod.open:
                peer_flags |= wire.PEER_JOINING
            for address in filter(None, (address4, address6)):
                peer = wire.Peer(pod.netns_cookie, pod.identity, peer_flags, pod.zone)
                self._peers.update(address_key(address), peer.pack())
            value = wire.Pod(address4, address6, pod.identity, pod_flags(pod), pod.zone)
            self._pods.update(netns_key(pod.netns_cookie), value.pack())
            if pod.open:
                (self._links / str(pod.netns_cookie)).unlink(missing_ok=True)
            else:
                # Behind the tables: whoever runs already is judged from the first moment, and never refused for their lack.
                self._guard(pod.netns_cookie, netns)
        except OSError:
            if known is None:
                self.remove(pod.netns_cookie, pod.addresses)
                namespace.restore(netns)
            raise

    def _guard(self, cookie: int, netns: int) -> None:
        """The sk_lookup link in the namespace; the loader replaces the program in it when there is a newer one."""
        path = self._links / str(cookie)
        if path.exists():
            link = links.open_pin(str(path))
            try:
                if links.link_info(link).where == os.fstat(netns).st_ino:
                    return
            finally:
                os.close(link)
        program = links.open_pin(str(self._program))
        try:
            link = links.attach(program, netns, links.SK_LOOKUP)
        finally:
            os.close(program)
        try:
            links.pin(link, str(path))
        finally:
            os.close(link)

    def remove(self, cookie: int, addresses: tuple[str, ...] = ()) -> None:
        """Forget it: ``addresses`` are known only when it was being added."""
        known = self.get(cookie)
        self._pods.delete(netns_key(cookie))
        (self._links / str(cookie)).unlink(missing_ok=True)
        # The address before the verdicts: whoever dials it from here while it runs on is never refused for their lack.
        self._release(cookie, known.addresses if known is not None else addresses)
        self._policies.delete(netns_key(cookie))
        _purge(self._captured, lambda key: wire.CapturedKey.unpack(key).netns == cookie)
        for key, value in self._connecting.items():
            if wire.Who.unpack(value).netns == cookie:
                self._connecting.delete(key)
        self._shares.delete(netns_key(cookie))

    def count_shares(self) -> int:
        """Set right what each pod has of the maps that have shares; how many were wrong.

        Entries that are removed from here are in no count. A pod that dials meanwhile is left for another time: one that is
        refused for what it has not is at rest.
        """
        before = dict(self._shares.items())
        # Values of the one and keys of the other begin with the cookie. They may be a quarter of a million.
        connecting = Counter(value[:_COOKIE_SIZE] for _, value in self._connecting.items())
        captured = Counter(key[:_COOKIE_SIZE] for key, _ in self._captured.items())
        wrong = 0
        for key, value in self._shares.items():
            right = wire.Share(connecting[key], captured[key]).pack()
            if value == before.get(key) and value != right:
                self._shares.update(key, right)
                wrong += 1
        return wrong

    def _release(self, cookie: int, addresses: Iterable[str]) -> None:
        """The addresses are nobody's any more, unless somebody else has them by now."""
        released: set[str] = set()
        for address in addresses:
            key = address_key(address)
            value = self._peers.lookup(key)
            if value is None or wire.Peer.unpack(value).netns != cookie:
                continue
            self._peers.delete(key)
            for port in _LISTENER_PORTS:
                self._listeners.delete(wire.Endpoint(address, port).pack())
            released.add(wire.canonical(address))
        if not released:
            return

        def about(key: bytes) -> bool:
            ends = wire.Tuple.unpack(key[:_TUPLE_SIZE])
            return ends.client_address in released or ends.server_address in released

        _purge(self._connecting, about)
        _purge(self._recent, about)

    def missing(self, cookie: int, netns: int) -> list[str]:
        """What is not as :meth:`add` made it, in words."""
        pod = self.get(cookie)
        if pod is None:
            return ["the pod is not in the kernel's tables"]
        found: list[str] = []
        for address in pod.addresses:
            value = self._peers.lookup(address_key(address))
            if value is None or wire.Peer.unpack(value).netns != cookie:
                found.append(f"address {address} is not the pod's in the kernel's tables")
        if self._policies.lookup(netns_key(cookie)) is None:
            found.append("no policy")
        if pod.open:
            return found + namespace.lacks(netns)
        try:
            link = links.open_pin(str(self._links / str(cookie)))
        except links.LinkError:
            found.append("no sk_lookup link")
        else:
            try:
                if links.link_info(link).where != os.fstat(netns).st_ino:
                    found.append("the sk_lookup link is not in the pod's namespace")
            finally:
                os.close(link)
        return found + namespace.lacks(netns)

    def gone(self) -> set[int]:
        """Cookies of pods whose namespace is no more."""
        found: set[int] = set()
        for cookie in self.all():
            try:
                link = links.open_pin(str(self._links / str(cookie)))
            except links.LinkError:  # the loader found it gone
                found.add(cookie)
                continue
            try:
                if links.link_info(link).where == 0:
                    found.add(cookie)
            finally:
                os.close(link)
        return found

    # Peers

    def set_peer(self, address: str, peer: Peer) -> None:
        key = address_key(address)
        if self._is_pods(key):
            return
        flags = (
            (wire.PEER_LOCAL if peer.local else 0)
            | (wire.PEER_ENROLLED if peer.enrolled else 0)
            | (wire.PEER_JOINING if peer.joining else 0)
            | (wire.PEER_NODE if peer.node else 0)
        )
        value = wire.Peer(0, peer.identity, flags, peer.zone).pack()
        if self._peers.lookup(key) != value:
            self._peers.update(key, value)

    def remove_peer(self, address: str) -> None:
        key = address_key(address)
        if not self._is_pods(key):
            self._peers.delete(key)

    def _is_pods(self, key: bytes) -> bool:
        value = self._peers.lookup(key)
        return value is not None and wire.Peer.unpack(value).netns != 0

    def peers(self) -> dict[str, Peer]:
        found: dict[str, Peer] = {}
        for key, value in self._peers.items():
            peer = wire.Peer.unpack(value)
            found[wire.unpack_address(key)] = Peer(
                bool(peer.flags & wire.PEER_LOCAL),
                bool(peer.flags & wire.PEER_ENROLLED),
                peer.identity,
                bool(peer.flags & wire.PEER_JOINING),
                peer.zone,
                bool(peer.flags & wire.PEER_NODE),
            )
        return found


def _pod(cookie: int, pod: wire.Pod) -> Pod:
    passing, is_open = bool(pod.flags & wire.POD_PASSING), bool(pod.flags & wire.POD_OPEN)
    addresses = tuple(filter(None, (pod.address4, pod.address6)))
    return Pod(
        cookie, addresses, pod.identity, passing, is_open, pod.zone, not pod.flags & wire.POD_NO_SPLICE
    )


def _purge(table: Map, about: Callable[[bytes], bool]) -> None:
    for key, _ in table.items():
        if about(key):
            table.delete(key)
