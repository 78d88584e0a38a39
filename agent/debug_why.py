"""``/debug/why``: what this node's kernel does with a connection, step by step, beside what the policies say.

Owns the question's parameters, who is asked for, and the comparison: at each step that judges, the kernel's word (from the pinned
tables, :mod:`agent.kernel.walk`) stands beside the model's (:mod:`agent.debug_model`), and where they differ it is said. What
another node decides is asked there (``arrival``), which is the caller's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from agent.compiler import Tables as Compiled
from agent.debug_model import Model, Said
from agent.debug_parties import HOST, KUBELET, Parties, Party
from agent.frontends import ANY_NODE, family_of
from agent.identities import Identities
from agent.kernel.arrivals import OWN_PORTS
from agent.kernel.steps import (
    Branch,
    Dialler,
    Question,
    Step,
    Walk,
    Way,
    reason_text,
    shown_branch,
    shown_walk,
)
from agent.kernel.tables import Tables
from agent.kernel.walk import Walker
from agent.mesh import Mesh
from agent.metrics import name_of
from agent.passage import Stage
from agent.pods import Pods
from bpf import wire
from bpf.wire import Reason
from common.admin import BadQueryError
from controlplane.api import Workload

_PARAMETERS = ("source", "destination", "port", "protocol", "node", "arrival")
_ARRIVALS = ("", "hbone", "plain")
_JUDGING = frozenset({"egress", "authorization", "ingress"})


class Node(Protocol):
    """The node, as far as this needs it (:class:`agent.node.Node`)."""

    @property
    def name(self) -> str: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def numbers(self) -> Identities: ...
    @property
    def pods(self) -> Pods: ...
    @property
    def tables(self) -> Compiled: ...
    def stage(self, netns_cookie: int) -> Stage | None: ...


@dataclass(frozen=True, slots=True)
class _Asked:
    source: Party
    destination: Party
    address: str  #: the destination's, of those it has
    own: str  #: the source's, of the same family
    port: int
    protocol: wire.Protocol
    dialler: Dialler
    arrival: str


class Why:
    """See the module. Called in the admin server's threads."""

    def __init__(self, node: Node, tables: Callable[[], Tables], host: Callable[[], frozenset[str]]) -> None:
        """``tables`` opens the kernel's, ``host`` gives the node's own addresses."""
        self._node = node
        self._open = tables
        self._host = host

    def page(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The answer as JSON has it, or ``elsewhere``: the node whose agent is to be asked.

        :raises BadQueryError: a parameter is unknown, missing, or names nobody.
        :raises KernelError: the tables cannot be read.
        """
        for name in query:
            if name not in _PARAMETERS:
                raise BadQueryError(f"{name}: no such parameter; there are {', '.join(_PARAMETERS)}")
        for name in ("source", "destination", "port"):
            if not query.get(name):
                raise BadQueryError(f"{name}: is missing")
        if query.get("arrival", "") not in _ARRIVALS:
            raise BadQueryError(f"arrival={query['arrival']}: neither hbone nor plain")
        node, mesh = self._node, self._node.mesh
        compiled, host = node.tables, self._host()
        peers = compiled.peers
        parties = Parties(
            mesh, node.pods.sandboxes(), lambda address: peers[address].uid if address in peers else ""
        )
        asked, elsewhere = self._asked(query, parties, host)
        if elsewhere:
            return {"node": node.name, "elsewhere": elsewhere}
        model = Model(mesh, compiled, node=node.name, host=host)
        with self._open() as tables:
            return _Answer(node, model, tables, parties, asked).made()

    def _asked(self, query: Mapping[str, str], parties: Parties, host: frozenset[str]) -> tuple[_Asked, str]:
        protocol = query.get("protocol", "tcp").upper()
        if protocol not in wire.Protocol.__members__:
            raise BadQueryError(f"protocol={query['protocol']}: neither tcp nor udp")
        here, wanted, arrival = self._node.name, query.get("node", ""), query.get("arrival", "")
        destination = parties.destination(query["destination"])
        port = parties.port(destination, query["port"], protocol)
        said = query["source"]
        if said in (KUBELET, HOST):
            dialler = Dialler.PROBER if said == KUBELET else Dialler.HOST
            at = wanted or destination.node or here
            source = Party(said, _nearest(host, destination.meant), node=at)
        else:
            dialler, source = Dialler.APPLICATION, parties.source(said)
            if source.service is not None:
                raise BadQueryError(
                    f"source {said}: is the address of service "
                    f"{source.service.namespace}/{source.service.name}, from which nothing comes"
                )
            if source.workload is None and source.sandbox is None:
                dialler = Dialler.HOST if source.addresses[0] in host else Dialler.APPLICATION
            at = source.node or wanted or destination.node or here
        if wanted and source.node and source.node != wanted:
            raise BadQueryError(f"source {said}: is on node {source.node}, not on {wanted}")
        elsewhere = "" if arrival or at == here else at
        address = next((a for a in destination.meant if source.address(a)), destination.address())
        if not address:
            raise BadQueryError(f"destination {destination.text}: has no address yet")
        own = source.address(address)
        if not own and (source.named or not self._in_kernel(source)):
            raise BadQueryError(f"source {said}: has no address of the family of {address}")
        return _Asked(
            source, destination, address, own, port, wire.Protocol[protocol], dialler, arrival
        ), elsewhere

    def _in_kernel(self, party: Party) -> bool:
        """Whether it is a pod of this node that the kernel is to have."""
        return party.sandbox is not None and self._node.stage(party.sandbox.netns_cookie) is not None


class _Answer:
    """One question's, in one state of node and kernel."""

    def __init__(self, node: Node, model: Model, tables: Tables, parties: Parties, asked: _Asked) -> None:
        self._node = node
        self._model = model
        self._tables = tables
        self._parties = parties
        self._asked = asked
        self._differences: list[str] = []

    def made(self) -> dict[str, Any]:
        asked, names = self._asked, self._node.numbers
        walker = Walker(self._tables, lambda n: name_of(n, names) if names.label(n) is not None else "")
        netns = self._netns(asked.source)
        if asked.arrival == "hbone":
            branch = Branch(asked.address, asked.port, 1.0)
            walker.delivery(branch)
            walk = Walk(branches=[branch])
            self._node_proxy_judges(branch)
        else:
            question = Question(
                asked.own,
                asked.address,
                asked.port,
                asked.protocol,
                0 if asked.arrival else netns,
                asked.dialler,
                self._endpoints(),
            )
            walk = walker.walk(question)
            if asked.arrival:
                walk.steps.clear()
        self._compare_source(netns)
        self._compare_service(walk)
        endpoints = [self._endpoint(branch, walk) for branch in walk.branches]
        return {
            "node": self._node.name,
            "source": asked.source.shown() | {"address": asked.own, "dialler": asked.dialler.value},
            "destination": asked.destination.shown()
            | {"address": asked.address, "port": asked.port, "protocol": asked.protocol.name},
            **shown_walk(walk),
            "endpoints": endpoints,
            "differences": list(dict.fromkeys(self._differences)),
        }

    def _netns(self, party: Party) -> int:
        """0 where it is no pod that the kernel is to have."""
        if party.sandbox is None or self._node.stage(party.sandbox.netns_cookie) is None:
            return 0
        return party.sandbox.netns_cookie

    def _endpoints(self) -> tuple[tuple[str, int], ...]:
        """Whom l7proxy (or for clients outside of the mesh kube-proxy) may choose: as the controller says."""
        asked, found = self._asked, set[tuple[str, int]]()
        service = asked.destination.service
        if service is None:
            return ()
        for port in service.ports:
            if port.port == asked.port and port.protocol == asked.protocol.name:
                for end in port.endpoints:
                    if family_of(end.address) == family_of(asked.address) and end.weight > 0:
                        found.add((end.address, end.port))
        return tuple(sorted(found))

    # Beside the model

    def _compare_source(self, netns: int) -> None:
        source = self._asked.source
        if netns and source.sandbox is not None and self._is_settled(netns, source.workload):
            self._differences += self._model.pod_differs(
                netns, source.sandbox.uid, source.addresses, self._tables.pod(netns)
            )
            for address in source.addresses:
                peer = self._tables.peer(address)
                self._note(self._model.peer_differs(wire.canonical(address), peer, netns))

    def _is_settled(self, netns: int, workload: Workload | None) -> bool:
        """In the mesh wholly: who joins or leaves is in the kernel as its stage has it."""
        return self._node.stage(netns) is Stage.ENROLLED and workload is not None and workload.enrolled

    def _compare_service(self, walk: Walk) -> None:
        asked = self._asked
        if asked.arrival or asked.dialler is not Dialler.APPLICATION or not self._netns(asked.source):
            return
        keys = [wire.Endpoint(asked.address, asked.port, asked.protocol)]
        if walk.service is not None:
            keys = [walk.service]
        elif (peer := self._tables.peer(asked.address)) is not None and peer.flags & wire.PEER_NODE:
            keys.append(wire.Endpoint(ANY_NODE[family_of(asked.address)], asked.port, asked.protocol))
        for key in keys:
            service = self._tables.service(key)
            slots, missing = self._tables.slots(key, service) if service is not None else ([], [])
            self._differences += self._model.service_differs(key, service, slots, missing)

    def _endpoint(self, branch: Branch, walk: Walk) -> dict[str, Any]:
        party = self._parties.source(branch.address)
        netns = self._netns(party)
        server = party.workload
        if not netns or self._is_settled(netns, server):
            peer = self._tables.peer(branch.address)
            self._note(self._model.peer_differs(branch.address, peer, netns))
        if netns and party.sandbox is not None and self._is_settled(netns, server):
            self._differences += self._model.pod_differs(
                netns, party.sandbox.uid, party.addresses, self._tables.pod(netns)
            )
        said = self._wished(branch, server, netns)
        judged = {step.step: step for step in branch.steps if step.step in _JUDGING}
        differs = False
        for name, one in said.items():
            step = judged.get(name)
            if step is None:
                continue
            step.policies, step.model = one.policies, f"{one.word}: {one.text}"
            if one.allowed is not (not step.refused):
                differs = True
                self._note(
                    f"{branch.address}:{branch.port} {name}: the kernel {'refuses' if step.refused else 'allows'} "
                    f"({step.refused or 'an entry'}), the model has it {one.word}: {one.text}"
                )
        refusing = next(((name, one) for name, one in said.items() if not one.allowed), None)
        wished = "refused" if refusing is not None or self._is_never_allowed(branch) else "allowed"
        kernel = "refused" if branch.refused else "allowed"
        if not branch.remote and kernel != wished and not differs:
            why = f", by {refusing[0]}" if refusing is not None else ""
            self._note(
                f"{branch.address}:{branch.port}: {kernel} by the kernel ({branch.refused or 'no step refuses'}), "
                f"{wished} by the model{why}"
            )
        shown = shown_branch(branch)
        shown["model"] = wished
        shown["policies"] = list(refusing[1].policies if refusing is not None else _all(said))
        if server is not None:
            shown["pod"] = f"{server.namespace}/{server.name}"
            shown["node"] = server.node
        elif branch.remote:
            shown["node"] = party.node
        return shown

    def _is_never_allowed(self, branch: Branch) -> bool:
        """Whatever policies say: plain text from an address of the mesh, its own ports, a family that the pod lacks."""
        if branch.refused == reason_text(Reason.NO_ADDRESS):
            return True
        if branch.port in OWN_PORTS:
            return branch.refused in (reason_text(Reason.NOT_CAPTURED), reason_text(Reason.OWN_PORT))
        return branch.refused == reason_text(Reason.SPOOFED) and self._asked.arrival != "hbone"

    def _wished(self, branch: Branch, server: Workload | None, netns: int) -> dict[str, Said]:
        """What policies say of each thing that is asked on this way, in order; also of what the kernel did not come to."""
        asked, model, found = self._asked, self._model, dict[str, Said]()
        client = asked.source.workload
        if branch.way is Way.SELF:
            return found
        if asked.arrival == "hbone":
            return self._by_node_proxy()
        steps = {step.step for step in branch.steps}
        # Who joins or leaves is not isolated yet, nor any more: but where the kernel asks a policy, it is that.
        own = self._netns(asked.source)
        captured = own and client is not None and (self._is_settled(own, client) or "egress" in steps)
        if captured and client is not None and not asked.arrival and branch.address != asked.own:
            found["egress"] = model.egress(client, branch.address, asked.protocol, branch.port)
        in_mesh = server is not None and server.enrolled
        peer = self._tables.peer(branch.address)
        if not in_mesh and not (peer is not None and peer.netns and peer.flags & wire.PEER_ENROLLED):
            return found
        if branch.remote or branch.way is Way.PROBE or not asked.own:
            return found
        # The same of who is dialled; and no policy speaks of our own ports.
        unsettled = netns and server is not None and not self._is_settled(netns, server)
        if (unsettled or branch.port in OWN_PORTS) and "authorization" not in steps:
            return found
        by = client if client is not None and client.enrolled else None
        if branch.way is Way.PLAIN:
            by = None
        found["authorization"] = model.authorization(server, by, asked.own, branch.port)
        if server is not None:
            found["ingress"] = model.ingress(server, asked.own, asked.protocol, branch.port)
        return found

    def _node_proxy_judges(self, branch: Branch) -> None:
        """At the end of an HBONE connection: there the model is what judges."""
        for name, said in self._by_node_proxy().items():
            if branch.refused:
                return
            reason = Reason.POLICY if name == "authorization" else Reason.NETWORK_POLICY
            branch.add(
                Step(
                    name,
                    f"by the node proxy, by certificate: {said.word}",
                    refused="" if said.allowed else reason_text(reason),
                    facts={"judged_by": "nodeproxy"},
                )
            )

    def _by_node_proxy(self) -> dict[str, Said]:
        """What it judges by, as this agent has it. It refuses whose address nobody is known to have."""
        asked, model = self._asked, self._model
        server, client = model.workload_at(asked.address), model.workload_at(asked.own)
        if client is None:
            return {"authorization": Said(False, (), f"nobody is known at {asked.own}")}
        found = {"authorization": model.authorization(server, client, asked.own, asked.port)}
        if server is not None:
            found["ingress"] = model.ingress(server, asked.own, asked.protocol, asked.port)
        return found

    def _note(self, difference: str) -> None:
        if difference:
            self._differences.append(difference)


def _all(said: Mapping[str, Said]) -> list[str]:
    return [policy for one in said.values() for policy in one.policies]


def _nearest(addresses: frozenset[str], others: tuple[str, ...]) -> tuple[str, ...]:
    """Of each family the one of the node's addresses that shares most with where it goes to."""
    found = []
    for other in others:
        same = [a for a in addresses if family_of(a) == family_of(other) and not _is_here(a)]
        bits = int(ipaddress.ip_address(other))
        if same:
            found.append(min(sorted(same), key=lambda a: int(ipaddress.ip_address(a)) ^ bits))
    return tuple(found)


def _is_here(address: str) -> bool:
    one = ipaddress.ip_address(address)
    return one.is_loopback or one.is_link_local
