"""What arrives at a pod of this node, told from the tables: the second half of a walk.

Owns the mirror of ``lookup.c``, of ``to_pod()`` in ``veth.c`` and of ``judge_via()``; see :mod:`agent.kernel.walk`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agent.kernel.steps import NO_INTERFACE, Branch, Dialler, Question, Step, Walk, Way, end_text, reason_text
from agent.kernel.tables import Judgement, Tables
from bpf import wire
from bpf.wire import Direction, Protocol, Reason, Role, Via

OWN_PORTS = frozenset({wire.PORT_OUTBOUND, wire.PORT_OUTBOUND_L7, wire.PORT_HBONE})


class Arrivals:
    """:param name: what people call an identity."""

    def __init__(self, tables: Tables, name: Callable[[int], str] = lambda n: f"identity {n}") -> None:
        self._tables = tables
        self._name = name

    def arrival(self, question: Question, branch: Branch) -> None:
        """Of somebody whom no hook of this node has seen: plain text by its address."""
        peer = self._peer(branch)
        branch.way = Way.DATAGRAM if question.protocol is Protocol.UDP else Way.PLAIN
        host = question.dialler is Dialler.HOST
        if peer is None or not peer.flags & wire.PEER_ENROLLED:
            netns = self._owner(branch.address) if question.protocol is Protocol.UDP else 0
            if netns:
                self.datagram_arrives(question.source, netns, branch, host=host)
            else:
                self._plain(branch)
            return
        if not peer.flags & wire.PEER_LOCAL:
            branch.add(Step("way", "plain, judged on the endpoint's node"))
            branch.remote = True
            return
        if question.protocol is Protocol.UDP:
            self.datagram_arrives(question.source, peer.netns, branch, host=host)
            return
        if self._is_open(peer, branch) or self._own_port(branch):
            return
        sender = self._tables.peer(question.source)
        if sender is not None and sender.flags & wire.PEER_ENROLLED and not sender.flags & wire.PEER_JOINING:
            text = f"plain text from {question.source}, which is a pod's in the mesh ({self._called(sender.identity)})"
            branch.add(Step("way", text, ("peers", "connecting"), reason_text(Reason.SPOOFED)))
            return
        branch.add(Step("way", "plain: nobody wrote down who dials", ("connecting",)))
        self._judge_via(Via.PLAIN, peer, wire.IDENTITY_PLAIN, question.source, branch)

    def datagram_arrives(self, source: str, netns: int, branch: Branch, *, host: bool = False) -> None:
        """As ``to_pod()``, of a datagram that begins something."""
        if not self._veth_judges(netns, branch):
            return
        sender = self._tables.peer(source)
        enrolled = sender is not None and bool(sender.flags & wire.PEER_ENROLLED)
        identity = sender.identity if sender is not None and enrolled else wire.IDENTITY_PLAIN
        text = f"by who has its source's address: {self._called(identity)}"
        branch.add(Step("veth", text, ("interfaces", "peers"), facts={"identity": identity}))
        found = self._tables.judge(netns, identity, source, branch.port)
        if self._authorization(netns, branch, found) and not host:
            self._ingress(source, netns, branch, Protocol.UDP)

    def _veth_judges(self, netns: int, branch: Branch) -> bool:
        """Whether what comes to a pod's veth is judged there; a step where it is not."""
        veth = self._tables.interface(netns)
        if veth is None:
            text = "the endpoint's has no entry: all that comes to it is dropped"
            branch.add(Step("veth", text, ("interfaces",), NO_INTERFACE))
        elif veth.flags & wire.POD_OPEN:
            branch.add(Step("veth", "the endpoint joins or leaves: not judged", ("interfaces",)))
        else:
            return True
        return False

    def delivery(self, branch: Branch) -> None:
        """Of the node proxy, by HBONE from another node."""
        branch.way = Way.CAPTURED
        peer = self._peer(branch)
        if peer is None or not peer.flags & wire.PEER_LOCAL or not peer.flags & wire.PEER_ENROLLED:
            text = "no pod in the mesh on this node, as the kernel has it"
            branch.add(Step("arrival", text, ("peers",), reason_text(Reason.UNKNOWN_DESTINATION)))
            return
        if not self._hbone_listener(branch):
            return
        if not self._leaves(peer.netns, branch.address, branch, "the endpoint's"):
            return
        if branch.port in OWN_PORTS:
            text = f"port {branch.port} is the mesh's own: the node proxy delivers nothing there"
            branch.add(Step("arrival", text, refused=reason_text(Reason.OWN_PORT)))
        elif not self._tables.has_role(Role.NODEPROXY):
            text = "no cgroup has the role NODEPROXY: what is delivered is anybody's plain text"
            branch.add(Step("arrival", text, ("roles",), reason_text(Reason.SPOOFED)))
        else:
            text = "the node proxy judges it by the client's certificate; what it delivers the kernel takes"
            branch.add(Step("arrival", text, ("roles", "connecting"), facts={"via": "tunnel"}))

    def _hbone_listener(self, branch: Branch) -> bool:
        where = end_text(branch.address, wire.PORT_HBONE)
        if self._tables.has_listener(branch.address, wire.PORT_HBONE):
            return branch.add(Step("listener", f"{where}, the node proxy's", ("listeners",)))
        reason = reason_text(Reason.NO_LISTENER)
        return branch.add(Step("listener", f"nobody listens at {where}", ("listeners",), reason))

    def _own_port(self, branch: Branch) -> bool:
        """Whether it is one of ours, of which no policy speaks."""
        if branch.port == wire.PORT_HBONE:
            self._hbone_listener(branch)
        elif branch.port in OWN_PORTS:
            text = f"port {branch.port} is the mesh's own, for what connect() turned there"
            branch.add(Step("way", text, refused=reason_text(Reason.NOT_CAPTURED)))
        else:
            return False
        return True

    def _stays(self, netns: int, own: str, step: Step, kind: Via, to: Walk | Branch) -> bool:
        """What never leaves the pod's namespace comes to sk_lookup there all the same: ``step`` says what it is."""
        pod, peer = self._tables.pod(netns), self._tables.peer(own)
        step.maps = ("peers", *step.maps)
        if pod is None or not pod.flags & wire.POD_OPEN:
            if peer is None or not peer.flags & wire.PEER_LOCAL or not peer.flags & wire.PEER_ENROLLED:
                step.text += f"; there nobody in the mesh has {own}"
                step.refused = reason_text(Reason.UNKNOWN_DESTINATION)
            elif peer.netns != netns:
                step.text += f"; {own} is another namespace's ({peer.netns})"
                step.refused = reason_text(Reason.SPOOFED if kind is Via.SELF else Reason.NOT_CAPTURED)
        return to.add(step)

    def _probe(self, question: Question, branch: Branch) -> None:
        peer = self._peer(branch)
        branch.way = Way.PROBE
        enrolled = peer is not None and bool(peer.flags & wire.PEER_ENROLLED)
        if peer is not None and enrolled and not peer.flags & wire.PEER_LOCAL:
            branch.add(Step("way", "plain, and no probe on another node: judged there", ("peers",)))
            branch.remote = True
        elif question.protocol is Protocol.UDP:
            netns = peer.netns if peer is not None and enrolled else self._owner(branch.address)
            if not netns:
                branch.way = Way.DATAGRAM
                self._plain(branch)
            elif self._veth_judges(netns, branch):
                branch.add(Step("way", "the node looks whether its pod lives: not judged", ("roles",)))
        elif peer is None or not enrolled:
            self._plain(branch)
        elif not self._is_open(peer, branch) and not self._own_port(branch):
            branch.add(Step("way", "a probe of the node's", ("connecting",)))
            self._judge_via(Via.PROBE, peer, wire.IDENTITY_PROBE, question.source, branch)

    def _is_open(self, peer: wire.Peer, branch: Branch) -> bool:
        pod = self._tables.pod(peer.netns)
        if pod is None or not pod.flags & wire.POD_OPEN:
            return False
        branch.add(Step("way", "the endpoint joins or leaves: plain text to it is not judged", ("pods",)))
        return True

    def _plain(self, branch: Branch) -> None:
        """To somebody who is not in the mesh. A pod of this node whom only ``peers`` does not know takes nobody's connection."""
        if branch.way is not Way.DATAGRAM:
            branch.way = Way.PLAIN
        branch.add(Step("way", "plain, as without a mesh: the other end is not in it"))
        pod = self._tables.pod(self._owner(branch.address))
        if pod is not None and not pod.flags & wire.POD_OPEN and branch.way is Way.PLAIN:
            text = "a pod of this node has this address, and peers does not say so"
            reason = reason_text(Reason.UNKNOWN_DESTINATION)
            branch.add(Step("arrival", text, ("pods", "peers"), reason))

    def _owner(self, address: str) -> int:
        """The pod of this node that has an address, by its own entry; 0: none."""
        for netns, pod in self._tables.pods().items():
            if address in (pod.address4, pod.address6):
                return netns
        return 0

    def _peer(self, branch: Branch) -> wire.Peer | None:
        peer = self._tables.peer(branch.address)
        if peer is None:
            text = "nobody that the mesh knows"
            branch.add(Step("peer", f"{branch.address}: {text}", ("peers",)))
            return None
        names = {
            wire.PEER_LOCAL: "on this node",
            wire.PEER_ENROLLED: "in the mesh",
            wire.PEER_JOINING: "joining or leaving",
            wire.PEER_NODE: "a node's own",
        }
        words = [word for flag, word in names.items() if peer.flags & flag]
        if not peer.flags & wire.PEER_LOCAL:
            words.insert(0, "elsewhere")
        text = f"{branch.address}: {self._called(peer.identity)}, {', '.join(words)}"
        facts = {"identity": peer.identity, "flags": peer.flags, "netns": peer.netns}
        branch.add(Step("peer", text, ("peers",), facts=facts))
        return peer

    def _ingress(self, source: str, netns: int, branch: Branch, protocol: Protocol) -> bool:
        found = self._tables.network(netns, Direction.INBOUND, source, protocol, branch.port)
        said = f"{source}, {protocol.name} {branch.port}"
        return self._network_step("ingress", found.isolated, found.allowed, found.address_class, said, branch)

    @staticmethod
    def _network_step(
        step: str, isolated: bool, allowed: bool, number: int, said: str, branch: Branch
    ) -> bool:
        facts = {"isolated": isolated, "allowed": allowed, "class": number}
        if not isolated:
            return branch.add(Step(step, "no NetworkPolicy isolates the pod", ("networks",), facts=facts))
        text = f"NetworkPolicy: {said} is in class {number}, which is {'' if allowed else 'not '}allowed"
        reason = "" if allowed else reason_text(Reason.NETWORK_POLICY)
        return branch.add(Step(step, text, ("networks",), reason, facts))

    def _authorization(self, netns: int, branch: Branch, found: Judgement) -> bool:
        facts: dict[str, Any] = {
            "identity": found.identity,
            "class": found.address_class,
            "generation": found.generation,
            "allowed": found.reason is None,
        }
        if found.reason is Reason.NO_POLICY:
            text = "the endpoint has no table of verdicts"
            return branch.add(Step("authorization", text, ("policies",), reason_text(found.reason), facts))
        said = self._called(found.identity)
        if found.address_class:
            blocks = self._tables.class_entries(netns, found.generation)
            facts["blocks"] = sorted(b for b, number in blocks.items() if number == found.address_class)
            said += f", address in {', '.join(facts['blocks'])}"
        if found.port is None:
            text = f"{said}: no entry for port {branch.port} or any"
        else:
            which = f"port {found.port}" if found.port else "any port"
            text = f"{said}: entry for {which} says {'DENY' if found.reason else 'ALLOW'}"
        text += f", generation {found.generation}"
        maps = ("policies", "classes") if found.address_class else ("policies",)
        reason = reason_text(found.reason) if found.reason else ""
        return branch.add(Step("authorization", text, maps, reason, facts))

    def _judge_via(self, kind: Via, peer: wire.Peer, identity: int, source: str, branch: Branch) -> bool:
        """As ``judge_via()``, and what becomes of the answer."""
        found = self._tables.judge(peer.netns, identity, source, branch.port)
        if kind is Via.PROBE and found.reason is Reason.POLICY:
            found = self._tables.judge(peer.netns, wire.IDENTITY_PLAIN, source, branch.port)
        if not self._authorization(peer.netns, branch, found):
            return False
        if kind is not Via.PROBE and not self._ingress(source, peer.netns, branch, Protocol.TCP):
            return False
        if kind is Via.DIRECT and branch.port in OWN_PORTS:
            # connect() asks the policy; sk_lookup, which is not there while the pod joins, knows better.
            pod = self._tables.pod(peer.netns)
            if not (pod is not None and pod.flags & wire.POD_OPEN):
                self._own_port(branch)
            if branch.refused:
                return False
        return self._leaves(peer.netns, branch.address, branch, "the endpoint's")

    def _leaves(self, netns: int, own: str, branch: Branch, whose: str = "the pod's own") -> bool:
        """As ``is_own_source()``: whether anything gets out of a pod by its veth. A step only where nothing does."""
        veth = self._tables.interface(netns)
        if veth is None:
            text = f"{whose} has no entry: all that it sends is dropped"
            return branch.add(Step("veth", text, ("interfaces",), NO_INTERFACE))
        if own in (veth.address4, veth.address6):
            return True
        if not (veth.address6 if ":" in own else veth.address4) and self._tables.peer(own) is None:
            return True
        text = f"{whose} has {' and '.join(filter(None, (veth.address4, veth.address6)))}, not {own}"
        return branch.add(Step("veth", text, ("interfaces",), reason_text(Reason.SPOOFED)))

    def _called(self, identity: int) -> str:
        match identity:
            case wire.IDENTITY_PLAIN:
                return "no identity"
            case wire.IDENTITY_PROBE:
                return "a probe"
            case wire.IDENTITY_TUNNEL:
                return "the node proxy"
            case wire.IDENTITY_MESH:
                return "any workload of the mesh"
        return f"{self._name(identity)} ({identity})" if self._name(identity) else f"identity {identity}"
