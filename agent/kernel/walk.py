"""What becomes of a connection or datagram, told from the tables: the programs' own lookups, in their order, one step each.

Owns the mirror of ``connect.c``, ``sockops.c`` (splice), ``datagrams.h`` and ``from_pod()`` of ``veth.c``; what arrives is
:mod:`agent.kernel.arrivals`'s, the tables themselves are read by :mod:`agent.kernel.tables`. It decides nothing, and knows
nothing of what was wished: who wants to know whether the kernel is right compares this with the model
(:mod:`agent.debug_why`).

A step that refuses ends the walk, as it ends the program. Of a service each backend that may be drawn has a branch.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import replace

from agent.kernel.arrivals import OWN_PORTS, Arrivals
from agent.kernel.steps import (
    MOST,
    Branch,
    Dialler,
    Question,
    Step,
    Walk,
    Way,
    end_text,
    reason_text,
)
from agent.kernel.tables import Slot
from bpf import wire
from bpf.wire import Direction, Endpoint, Protocol, Reason, Role, Via

_ANY_NODE = {False: "0.0.0.0", True: "::"}
#: VXLAN (two ports) and Geneve.
_OVERLAYS = frozenset({4789, 8472, 6081})


class Walker(Arrivals):
    """:param name: what people call an identity."""

    def walk(self, question: Question) -> Walk:
        """From the source on.

        :raises KernelError: a table cannot be read.
        """
        found = Walk()
        if question.dialler is Dialler.PROBER:
            self._prober(question, found)
            return found
        pod = self._tables.pod(question.netns) if question.netns else None
        if pod is None or question.dialler is Dialler.HOST:
            text = "no pod of this node that the kernel knows: its dials go as without a mesh"
            found.add(Step("source", text, ("pods",)))
            self._direct_only(question, found, self.arrival)
            return found
        own = pod.address6 if ":" in question.destination else pod.address4
        facts = {"netns": question.netns, "identity": pod.identity, "flags": pod.flags, "address": own}
        text = f"pod {own or 'without an address of this family'}, {self._called(pod.identity)}"
        if pod.flags & wire.POD_PASSING:
            text += "; it joins or leaves: its dials go as without a mesh"
        elif pod.flags & wire.POD_OPEN:
            text += "; it joins or leaves: plain text to it is not judged"
        found.add(Step("source", text, ("pods",), facts=facts))
        if pod.flags & wire.POD_PASSING:
            self._direct_only(question, found, self.arrival)
        elif _is_local(question.destination):
            self._here(question, found)
        elif question.protocol is Protocol.TCP:
            self._connect(question, pod, own, found)
        else:
            self._send(question, pod, own, found)
        return found

    def _prober(self, question: Question, found: Walk) -> None:
        text = "a process in a cgroup with the role PROBER"
        judge = self._probe
        if not self._tables.has_role(Role.PROBER):
            text = "no cgroup has the role PROBER: a process of the node as any other"
            question, judge = replace(question, dialler=Dialler.HOST), self.arrival
        elif question.l7 and question.protocol is Protocol.TCP:
            text += ", which dials no pod's address: nobody writes down that it is a probe"
            question, judge = replace(question, dialler=Dialler.HOST), self.arrival
        found.add(Step("source", text, ("roles",)))
        self._direct_only(question, found, judge)

    @staticmethod
    def _here(question: Question, found: Walk) -> None:
        """Loopback, and the addresses that a socket takes for its own host."""
        own_port = question.protocol is Protocol.TCP and question.port in OWN_PORTS
        if own_port and question.destination == _ANY_NODE[False]:
            text = f"port {question.port} is the mesh's own, and may be dialled at no address of the pod's"
            found.add(Step("destination", text, refused=reason_text(Reason.OWN_PORT)))
            return
        found.add(Step("destination", "this host: nothing of the mesh's"))
        found.branches.append(Branch(question.destination, question.port, 1.0, way=Way.PLAIN))

    def _direct_only(
        self, question: Question, found: Walk, judge: Callable[[Question, Branch], None]
    ) -> None:
        """Nobody turns the address to another one here; of a service's it is kube-proxy who does."""
        ends = question.l7 or ((question.destination, question.port),)
        for address, port in ends[:MOST]:
            branch = Branch(address, port, None if len(ends) > 1 else 1.0)
            found.branches.append(branch)
            if self._uncaptured(question, branch):
                judge(question, branch)
        found.left_out = max(0, len(ends) - MOST)

    def _connect(self, question: Question, pod: wire.Pod, own: str, found: Walk) -> None:
        key = Endpoint(question.destination, question.port, Protocol.TCP)
        service = self._tables.service(key)
        peer = None if service is not None else self._tables.peer(key.address)
        enrolled = peer is not None and bool(peer.flags & wire.PEER_ENROLLED)
        if not own and enrolled:
            found.add(_no_address())
            return
        if key.port in OWN_PORTS and enrolled:
            text = f"port {key.port} of a pod in the mesh is the mesh's own"
            found.add(Step("destination", text, ("peers",), reason_text(Reason.OWN_PORT)))
            return
        service, key = self._service(service, key, peer, found)
        if service is None:
            self._branches(found, [Slot(key.address, key.port, 1.0)], question, pod, own, self._tcp)
            return
        if not own:
            found.add(_no_address())
            return
        if service.flags & wire.SERVICE_L7:
            text = f"captured to {end_text(own, wire.PORT_OUTBOUND_L7)}, l7proxy's"
            if self._captured_to(question.netns, own, wire.PORT_OUTBOUND_L7, text, found):
                slots = [Slot(a, p, 1.0) for a, p in question.l7]
                self._branches(found, slots, question, pod, own, self._l7)
                for branch in found.branches:
                    branch.share = None
            found.steps[-1].facts = {"way": Way.CAPTURED_L7.value}
            return
        self._drawn(found, key, service, question, pod, own, self._tcp)

    def _service(
        self, service: wire.Service | None, key: Endpoint, peer: wire.Peer | None, found: Walk
    ) -> tuple[wire.Service | None, Endpoint]:
        """Also by node port (``find_node_port``)."""
        if service is None and peer is not None and peer.flags & wire.PEER_NODE:
            any_node = Endpoint(_ANY_NODE[":" in key.address], key.port, key.protocol)
            service = self._tables.service(any_node)
            key = any_node if service is not None else key
        said = f"{end_text(key.address, key.port)}/{Protocol(key.protocol).name}"
        if service is None:
            found.add(Step("service", f"none at {said}: dialled as it is", ("services",)))
            return None, key
        found.service = key
        kind = "L7, to l7proxy" if service.flags & wire.SERVICE_L7 else f"{service.count} slots"
        text = f"{said}: {kind}"
        affinity = (
            service.flags >> wire.SERVICE_AFFINITY_SHIFT if service.flags & wire.SERVICE_AFFINITY else 0
        )
        if affinity:
            text += f", a client keeps its endpoint for {affinity} s"
        if key.address in _ANY_NODE.values():
            text += " (a node port)"
        facts = {
            "id": service.id,
            "generation": service.generation,
            "l7": bool(service.flags & wire.SERVICE_L7),
            "affinity_s": affinity,
            "slots": service.count,
        }
        found.add(Step("service", text, ("services",), facts=facts))
        return service, key

    def _drawn(
        self,
        found: Walk,
        key: Endpoint,
        service: wire.Service,
        question: Question,
        pod: wire.Pod,
        own: str,
        judge: Callable[[Question, wire.Pod, str, Branch], None],
    ) -> None:
        """As ``choose()``."""
        slots, missing = self._tables.slots(key, service)
        kept = self._tables.kept(question.netns, key, service)
        few = bool(service.flags & wire.SERVICE_FEW)
        maps: tuple[str, ...] = ("services",) if few else ("backends",)
        if service.flags & wire.SERVICE_AFFINITY:
            maps += ("affinity",) if few else ("affinity", "members")
        lost = 0.0
        if kept is not None:
            slots = [Slot(*kept, 1.0)]
            text = f"{end_text(*kept)}, which the pod had last"
        elif not slots:
            found.add(Step("endpoints", "none", maps, reason_text(Reason.NO_BACKEND)))
            return
        else:
            text = f"{len(slots)}, drawn " + ("by weight" if len({s.share for s in slots}) > 1 else "alike")
            if missing:
                # One that is not there is drawn again, and refused the last time.
                miss = 1.0 - sum(slot.share for slot in slots)
                lost = miss**wire.DRAWS
                again = sum(miss**number for number in range(wire.DRAWS))
                slots = [slot._replace(share=slot.share * again) for slot in slots]
                text += f"; slots {', '.join(map(str, missing[:10]))} are not there"
        found.add(Step("endpoints", text, maps, facts={"kept": kept is not None, "missing_slots": missing}))
        self._branches(found, slots, question, pod, own, judge)
        if lost:
            branch = Branch(question.destination, question.port, lost)
            text = "every draw hits slots that are not there"
            branch.add(Step("endpoints", text, maps, reason_text(Reason.NO_BACKEND)))
            found.branches.append(branch)

    @staticmethod
    def _branches(
        found: Walk,
        slots: Sequence[Slot],
        question: Question,
        pod: wire.Pod,
        own: str,
        judge: Callable[[Question, wire.Pod, str, Branch], None],
    ) -> None:
        for slot in slots[:MOST]:
            branch = Branch(slot.address, slot.port, slot.share)
            found.branches.append(branch)
            if (":" in slot.address) is (":" in question.destination):
                judge(question, pod, own, branch)
            else:
                text = "of another family than the address that was dialled"
                branch.add(Step("endpoints", text, found.steps[-1].maps, reason_text(Reason.NO_BACKEND)))
        found.left_out = max(0, len(slots) - MOST)

    def _tcp(self, question: Question, pod: wire.Pod, own: str, branch: Branch) -> None:
        """An application's, to an endpoint."""
        peer = self._peer(branch)
        if branch.address == own:
            branch.way = Way.SELF
            text = "the pod's own address: to itself, never forbidden"
            if self._stays(question.netns, own, Step("way", text), Via.SELF, branch):
                if self._own_port(branch):
                    return
                self._splice(pod, pod, branch)
            return
        if not self._egress(question, branch):
            return
        if peer is None or not peer.flags & wire.PEER_ENROLLED:
            self._plain(branch)
            if not branch.refused:
                self._leaves(question.netns, own, branch)
            return
        if not peer.flags & wire.PEER_LOCAL:
            branch.way = Way.CAPTURED
            text = f"captured to {end_text(own, wire.PORT_OUTBOUND)}, the node proxy's: HBONE to the endpoint's node"
            if self._captured_to(question.netns, own, wire.PORT_OUTBOUND, text, branch):
                self._tunnel(question.netns, own, branch)
            return
        branch.way = Way.DIRECT
        branch.add(Step("way", "direct: the endpoint is on this node"))
        judged = self._judge_via(Via.DIRECT, peer, pod.identity, own, branch)
        if judged and self._leaves(question.netns, own, branch):
            self._splice(pod, self._tables.pod(peer.netns), branch)

    def _l7(self, question: Question, pod: wire.Pod, own: str, branch: Branch) -> None:
        """l7proxy's, from the pod's namespace, to the endpoint that its routes choose."""
        peer = self._peer(branch)
        if branch.address == own:
            branch.way = Way.SELF
            text = "l7proxy dials the pod itself: never forbidden"
            if self._stays(question.netns, own, Step("way", text), Via.SELF, branch):
                self._own_port(branch)
            return
        if not self._egress(question, branch):
            return
        if peer is None or not peer.flags & wire.PEER_ENROLLED:
            self._plain(branch)
            if not branch.refused:
                self._leaves(question.netns, own, branch)
        elif not peer.flags & wire.PEER_LOCAL:
            branch.way = Way.CAPTURED
            branch.add(Step("way", "l7proxy hands it to the node proxy: HBONE to the endpoint's node"))
            self._tunnel(question.netns, own, branch)
        else:
            branch.way = Way.DIRECT
            branch.add(Step("way", "l7proxy dials it from the pod's namespace"))
            if self._judge_via(Via.DIRECT, peer, pod.identity, own, branch):
                self._leaves(question.netns, own, branch)

    def _captured_to(self, netns: int, own: str, port: int, text: str, to: Walk | Branch) -> bool:
        """By connect(), to a listener of ours in the pod's own namespace."""
        step = Step("way", text, ("listeners",))
        if not self._tables.has_listener(own, port):
            step.text += "; nobody listens there"
            step.refused = reason_text(Reason.NO_LISTENER)
        return self._stays(netns, own, step, Via.CAPTURED, to)

    def _tunnel(self, netns: int, own: str, branch: Branch) -> None:
        """The node proxy's own dial, from the pod's namespace to the endpoint's node, which decides then."""
        if not self._tables.has_role(Role.NODEPROXY):
            text = "no cgroup has the role NODEPROXY: what it dials is refused as an application's would be"
            branch.add(Step("way", text, ("roles",), reason_text(Reason.OWN_PORT)))
        else:
            branch.remote = self._leaves(netns, own, branch)

    def _splice(self, client: wire.Pod, server: wire.Pod | None, branch: Branch) -> None:
        switch = self._tables.splice_switch()
        if switch == wire.SPLICE_UNSUPPORTED:
            why = "this kernel cannot (docs/splice.md)"
        elif switch:
            why = "it is switched off on this node"
        elif client.flags & wire.POD_NO_SPLICE:
            why = "the client's pod has mycel.io/splice: disabled"
        elif server is None or server.flags & wire.POD_NO_SPLICE:
            why = "the server's pod has mycel.io/splice: disabled"
        else:
            why = ""
        branch.splice = not why
        text = f"off: {why}" if why else "on: past TCP, once both ends have read enough (docs/splice.md)"
        branch.add(Step("splice", text, ("splice_counters", "pods"), facts={"on": not why}))

    def _send(self, question: Question, pod: wire.Pod, own: str, found: Walk) -> None:
        key = Endpoint(question.destination, question.port, Protocol.UDP)
        service = self._tables.service(key)
        peer = None if service is not None else self._tables.peer(key.address)
        service, key = self._service(service, key, peer, found)
        if service is None:
            self._branches(found, [Slot(key.address, key.port, 1.0)], question, pod, own, self._datagram)
        else:
            self._drawn(found, key, service, question, pod, own, self._datagram)

    def _datagram(self, question: Question, pod: wire.Pod, own: str, branch: Branch) -> None:
        branch.way = Way.DATAGRAM
        peer = self._peer(branch)
        if peer is not None and peer.netns == question.netns:
            branch.way = Way.SELF
            branch.add(Step("way", "the pod's own address: it never leaves its namespace"))
            return
        if not own:
            branch.add(_nothing_to_send_from())
            return
        if not self._leaves(question.netns, own, branch) or self._is_overlay(peer, branch):
            return
        if not self._egress(question, branch):
            return
        if peer is None or not peer.flags & wire.PEER_ENROLLED:
            branch.add(Step("way", "as it is, not encrypted; the other end is not in the mesh"))
            if netns := self._owner(branch.address):
                self.datagram_arrives(own, netns, branch)
        elif not peer.flags & wire.PEER_LOCAL:
            branch.add(Step("way", "as it is, not encrypted; judged at the veth of the endpoint's node"))
            branch.remote = True
        else:
            branch.add(Step("way", "as it is, judged at the endpoint's veth"))
            self.datagram_arrives(own, peer.netns, branch)

    def _uncaptured(self, question: Question, branch: Branch) -> bool:
        """As ``from_pod()``: what a pod's socket sends that no hook has turned anywhere."""
        if not question.source:
            return branch.add(_nothing_to_send_from())
        if not question.netns:
            return True
        if not self._leaves(question.netns, question.source, branch):
            return False
        peer = self._tables.peer(branch.address)
        if question.protocol is Protocol.UDP and self._is_overlay(peer, branch):
            return False
        veth = self._tables.interface(question.netns)
        if veth is not None and veth.flags & wire.POD_PASSING:
            return True
        if question.protocol is Protocol.TCP and peer is not None and peer.flags & wire.PEER_ENROLLED:
            if peer.flags & (wire.PEER_LOCAL | wire.PEER_JOINING):
                return True
            text = "only the node proxy speaks to pods in the mesh on other nodes"
            return branch.add(Step("veth", text, ("interfaces",), reason_text(Reason.NOT_CAPTURED)))
        return self._egress(question, branch)

    @staticmethod
    def _is_overlay(peer: wire.Peer | None, branch: Branch) -> bool:
        """As ``is_overlay()``: what a node would unpack, and believe the addresses in it."""
        if branch.port not in _OVERLAYS or (peer is not None and not peer.flags & wire.PEER_NODE):
            return False
        text = f"port {branch.port} is an overlay network's: a pod sends there to pods only"
        branch.add(Step("veth", text, ("peers",), reason_text(Reason.SPOOFED)))
        return True

    def _egress(self, question: Question, branch: Branch) -> bool:
        found = self._tables.network(
            question.netns, Direction.OUTBOUND, branch.address, question.protocol, branch.port
        )
        said = f"{branch.address}, {question.protocol.name} {branch.port}"
        return self._network_step("egress", found.isolated, found.allowed, found.address_class, said, branch)


def _no_address() -> Step:
    text = "it is in the mesh, and of a family of which the pod has no address"
    return Step("destination", text, ("pods", "peers"), reason_text(Reason.NO_ADDRESS))


def _nothing_to_send_from() -> Step:
    text = "the pod has no address of this family to send from"
    return Step("way", text, ("pods",), reason_text(Reason.NO_ADDRESS))


def _is_local(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return found.is_loopback or found.is_unspecified
