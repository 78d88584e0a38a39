"""Real maps of the kernel, unpinned, with no program that reads them: for tests of what is read in them.

They are filled by the agent's own compiler and writers. What the programs make of the same maps is proved with real connections,
in ``tests/cli/test_why.py``.
"""

from __future__ import annotations

import socket
import struct
from contextlib import ExitStack
from typing import Self

from agent.compiler import Tables as Compiled
from agent.compiler import compile_tables
from agent.identities import Identities
from agent.kernel.policies import Policies
from agent.kernel.services import Services
from agent.kernel.tables import NAMES, Tables
from agent.mesh import Mesh
from agent.passage import Stage
from agent.pods import Attachment, Pods
from bpf import maps, schema, wire
from bpf.maps import Map
from controlplane.api import Workload

MAC = bytes.fromhex("020000000001")
#: The node's own address.
HOST = "10.244.1.1"


class Kernel:
    """The maps that :class:`agent.kernel.tables.Tables` reads."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.maps = {spec.name: self._create(spec) for spec in schema.MAPS if spec.name in NAMES}
        self.services = Services(self.maps["services"], self.maps["backends"], self.maps["members"])
        self.policies = Policies(self.maps["policies"], self.maps["classes"], self.maps["networks"])
        self._stack.callback(self.policies.close)

    def _create(self, spec: schema.MapSpec) -> Map:
        size = min(spec.max_entries, 1024)
        inner = None
        if spec.type == maps.HASH_OF_MAPS:
            model = schema.INNER[spec.name]
            inner = self._stack.enter_context(
                Map.create(
                    model.type,
                    "inner",
                    model.key_size,
                    model.value_size,
                    model.max_entries,
                    flags=model.flags,
                )
            )
        return self._stack.enter_context(
            Map.create(
                spec.type, spec.name, spec.key_size, spec.value_size, size, flags=spec.flags, inner=inner
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tables(self) -> Tables:
        return Tables(self.maps)

    def put(self, name: str, key: wire.Record | bytes, value: wire.Record | bytes) -> None:
        self.maps[name].update(
            key if isinstance(key, bytes) else key.pack(),
            value if isinstance(value, bytes) else value.pack(),
        )

    def listen(self, address: str, port: int) -> None:
        """Any listening socket is the one for that address and port."""
        sock = self._stack.enter_context(socket.socket())
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        self.put("listeners", wire.Endpoint(address, port), struct.pack("=Q", sock.fileno()))


class Node:
    """A node as ``/debug/why`` knows it, and its kernel with all that was compiled for it."""

    def __init__(self, kernel: Kernel, mesh: Mesh, name: str = "n1") -> None:
        self.kernel = kernel
        self.name = name
        self.mesh = mesh
        self.numbers = Identities()
        self.pods = Pods()
        self.stages: dict[int, Stage] = {}
        self.tables = Compiled(
            {}, compile_tables(mesh, node=name, attached={}, numbers=self.numbers).frontends, {}, {}, {}
        )
        here = [w for w in mesh.workloads.values() if w.node == name and not w.host_network]
        for cookie, workload in enumerate(here, 1001):
            self.pods.put(
                Attachment(
                    container_id=workload.uid,
                    ifname="eth0",
                    addresses=workload.addresses,
                    pod_uid=workload.uid,
                    pod_namespace=workload.namespace,
                    pod_name=workload.name,
                    netns_cookie=cookie,
                )
            )
            if workload.enrolled:
                self.stages[cookie] = Stage.ENROLLED
        self.write()

    def stage(self, netns_cookie: int) -> Stage | None:
        return self.stages.get(netns_cookie)

    def cookie(self, workload: Workload) -> int:
        return next(c for c, sandbox in self.pods.sandboxes().items() if sandbox.uid == workload.uid)

    def write(self) -> None:
        """As the programmer does."""
        kernel = self.kernel
        attached = {s.uid: s.addresses for s in self.pods.sandboxes().values()}
        self.tables = tables = compile_tables(
            self.mesh, node=self.name, attached=attached, numbers=self.numbers, host={HOST}
        )
        owners = {a: c for c, s in self.pods.sandboxes().items() if c in self.stages for a in s.addresses}
        for address, peer in tables.peers.items():
            flags = (
                (wire.PEER_LOCAL if peer.local else 0)
                | (wire.PEER_ENROLLED if peer.enrolled else 0)
                | (wire.PEER_NODE if peer.node else 0)
            )
            value = wire.Peer(owners.get(address, 0), peer.identity, flags, peer.zone)
            kernel.put("peers", wire.pack_address(address), value)
        for cgroup, role in enumerate((wire.Role.NODEPROXY, wire.Role.L7PROXY, wire.Role.PROBER), 1):
            kernel.put("roles", struct.pack("=Q", cgroup), struct.pack("=I", role))
        for frontend, entry in tables.frontends.entries.items():
            kernel.services.set(
                wire.Endpoint(*frontend), entry.backends, l7=entry.l7, affinity=entry.affinity
            )
        for cookie in self.stages:
            self._write_pod(cookie)

    def _write_pod(self, cookie: int) -> None:
        kernel, tables = self.kernel, self.tables
        sandbox = self.pods.sandboxes()[cookie]
        workload = self.mesh.workloads[sandbox.uid]
        four = next((a for a in sandbox.addresses if ":" not in a), "")
        six = next((a for a in sandbox.addresses if ":" in a), "")
        identity = tables.identities[sandbox.uid]
        flags = 0 if workload.splice else wire.POD_NO_SPLICE
        kernel.put("pods", struct.pack("=Q", cookie), wire.Pod(four, six, identity, flags))
        kernel.put(
            "interfaces",
            struct.pack("=I", cookie),
            wire.Interface(cookie, four, six, identity, flags, MAC),
        )
        verdicts = tables.policies[sandbox.uid]
        kernel.policies.set_policy(cookie, verdicts.table, 1, verdicts.classes)
        networks = tables.networks.get(sandbox.uid)
        if networks is not None:
            kernel.policies.set_network(cookie, wire.Direction.INBOUND, networks.ingress)
            kernel.policies.set_network(cookie, wire.Direction.OUTBOUND, networks.egress)
        for address in sandbox.addresses:
            for port in (wire.PORT_OUTBOUND, wire.PORT_OUTBOUND_L7, wire.PORT_HBONE):
                kernel.listen(address, port)
