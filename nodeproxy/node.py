"""The node proxy put together: pods, their listeners, and what a change of the mesh touches."""

from __future__ import annotations

import functools
import socket
from pathlib import Path

from agent.api import ListenerKind
from bpf.maps import MapError
from common import logs
from controlplane.api import ResourceError, Update
from nodeproxy.accounting import Accounting
from nodeproxy.agent_client import AgentClient, Pod
from nodeproxy.certificates import Certificates, Signer
from nodeproxy.handoff import Handoffs
from nodeproxy.inbound import Inbound
from nodeproxy.link import Link
from nodeproxy.loop import Loop, reset
from nodeproxy.mesh import Mesh
from nodeproxy.pool import Pool
from nodeproxy.tunnel import Tunnel, Tunnels

_log = logs.get(__name__)


class NodeProxy:
    """Everything of one node. The loop's thread calls all of it."""

    def __init__(self, loop: Loop, *, node: str, run: Path, sign: Signer, envoy: Path | None = None) -> None:
        """Put the parts together; :meth:`start` begins.

        :param run: the run folder: ``agent.sock`` is there, ``nodeproxy.sock`` is made there.
        :param sign: asks the controller for a certificate.
        :param envoy: the unix socket of a real Envoy in l7proxy's place.
        """
        kinds: tuple[ListenerKind, ...] = (ListenerKind.OUTBOUND, ListenerKind.HBONE)
        if envoy is not None:
            kinds = (*kinds, ListenerKind.OUTBOUND_L7)
        self.loop = loop
        self.mesh = Mesh()
        self.accounting = Accounting(loop)
        self.agent = AgentClient(loop, run / "agent.sock", kinds, self)
        self.certificates = Certificates(loop, sign, lambda: self.mesh.trust)
        self.pool = Pool(loop, self.agent, self.certificates)
        self.tunnels = Tunnels(loop, self.mesh, self.certificates, self.pool, self.accounting)
        self.inbound = Inbound(loop, self.mesh, self.agent, self.certificates, self.accounting)
        self.handoffs = Handoffs(loop, self.mesh, self.agent, self.tunnels, node)
        self._run = run
        self._envoy = envoy
        self._draining = False

    def start(self) -> None:
        """:raises OSError: ``nodeproxy.sock`` cannot be made."""
        self.handoffs.listen(self._run / "nodeproxy.sock")
        if self._envoy is not None:
            self.handoffs.listen_for_envoy()
        self.agent.start()

    def ready(self) -> bool | str:
        """For the readiness probe; called by another thread."""
        if not self.mesh.synced:
            return "no configuration from the controller yet"
        if not self.agent.connected:
            return "the agent is not connected"
        return True

    def update(self, update: Update) -> tuple[ResourceError, ...]:
        """From the controller; what is returned is not in force."""
        before = self.mesh.trust
        errors = self.mesh.apply(update)
        trust = self.mesh.trust
        if trust is not None and trust is not before:
            for link in self.links():
                link.verify_again(trust)
        self.certificates.wake()
        self.inbound.mesh_changed()
        self.tunnels.mesh_changed()
        return errors

    # --- pods --------------------------------------------------------------------------------------------------------

    def on_pod(self, pod: Pod) -> None:
        self.certificates.enroll(pod.uid, pod.identity)

    def on_listener(self, pod: Pod, kind: ListenerKind, listener: socket.socket) -> None:
        if self._draining:
            self.loop.close(listener)
        elif kind is ListenerKind.HBONE:
            self.inbound.listen(pod, listener)
        else:
            self._capture(pod, kind, listener)

    def on_left(self, pod: Pod) -> None:
        self.inbound.leave(pod)

    def on_withdraw(self, pod: Pod) -> None:
        self.tunnels.withdraw(pod)
        self.pool.withdraw(pod)
        self.inbound.withdraw(pod)
        self.handoffs.withdraw(pod)
        if not any(other.uid == pod.uid for other in self.agent.pods.values()):
            self.certificates.forget(pod.uid)

    def _capture(self, pod: Pod, kind: ListenerKind, listener: socket.socket) -> None:
        """Take what the kernel turned to a listener in the pod's namespace."""
        self.loop.listen(listener, functools.partial(self._captured, pod, kind))

    def _captured(self, pod: Pod, kind: ListenerKind, sock: socket.socket, client: tuple[str, int]) -> None:
        captured = self.agent.captured
        try:
            found = captured.find(pod.netns_cookie, client[0], client[1], kind.port) if captured else None
        except MapError as error:
            _log.error("captured cannot be read", reason=str(error))
            found = None
        if found is None:
            # The client is gone again, or nobody captured it: there is nowhere to carry it.
            _log.warning("connection without a destination", pod=pod.uid, client=client[0], port=client[1])
            reset(self.loop, sock)
            return
        service = (found.service_address, found.service_port)
        if kind is ListenerKind.OUTBOUND_L7:
            assert self._envoy is not None
            self.handoffs.to_envoy(pod, sock, client, service, self._envoy)
            return
        destination = (found.destination_address, found.destination_port)
        Tunnel(self.tunnels, pod, sock, client, destination, service=service).start()

    # --- draining ----------------------------------------------------------------------------------------------------

    def drain(self, deadline: float) -> None:
        """Take nothing new, let what is open end for ``deadline`` seconds, then stop the loop."""
        if self._draining:
            return
        self._draining = True
        self.handoffs.stop()
        for pod in self.agent.pods.values():
            for listener in pod.listeners.values():
                self.loop.close(listener)
            pod.listeners.clear()
        for link in self.links():
            link.shutdown()
        self._drained(self.loop.now + deadline)

    def _drained(self, until: float) -> None:
        open_now = self.tunnels.open or self.inbound.open or self.inbound.waiting or self.handoffs.pairs
        busy = open_now or any(link.open and link.core.tail for link in self.links())
        if busy and self.loop.now < until:
            self.loop.later(0.05, lambda: self._drained(until))
            return
        # The end of the process would close sockets as if they had ended: what has not is reset.
        for link in self.links():
            link.close("draining")
        self.tunnels.close("draining")
        self.handoffs.close("draining")
        self.loop.stop()

    def links(self) -> list[Link]:
        return [*self.inbound.links(), *self.pool.links()]

    def state(self) -> dict[str, object]:
        """For the debug page; called by another thread."""
        return {
            "pods": {
                pod.uid: {"address": pod.address, "listeners": [kind.value for kind in pod.listeners]}
                for pod in list(self.agent.pods.values())
            },
            "certificates": self.certificates.states(),
            "tunnels": self.accounting.open_tunnels(),
            "version": self.mesh.version,
        }
