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
from nodeproxy.agent_client import LINGER, AgentClient, Pod
from nodeproxy.certificates import Certificates, Signer
from nodeproxy.handoff import Handoffs
from nodeproxy.inbound import Inbound
from nodeproxy.link import Link
from nodeproxy.loop import Loop, Timer, reset
from nodeproxy.mesh import Mesh
from nodeproxy.pool import Pool
from nodeproxy.tunnel import Tunnel, Tunnels

_log = logs.get(__name__)

#: Seconds that a new process waits for the certificates of the pods that it finds, before it serves those that it has.
PREPARE = 15.0
#: Seconds for peers to hear that they should go to another connection before streams on this one are refused.
WARNING = 1.0
#: Seconds that open connections have at the end when no successor takes new ones meanwhile: those are refused that long.
ALONE = 5.0
_LOOK = 0.05


class NodeProxy:
    """Everything of one node. The loop's thread calls all of it."""

    def __init__(
        self,
        loop: Loop,
        *,
        node: str,
        run: Path,
        sign: Signer,
        envoy: Path | None = None,
        revoke_after: float | None = 0.0,
    ) -> None:
        """Put the parts together; :meth:`start` begins.

        :param run: the run folder: ``agent.sock`` is there, ``nodeproxy/nodeproxy.sock`` is made there.
        :param sign: asks the controller for a certificate.
        :param envoy: the unix socket of a real Envoy in l7proxy's place.
        :param revoke_after: seconds that open connections have from a change that refuses them; None: until they end.
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
        self._socket = run / "nodeproxy" / "nodeproxy.sock"
        self._envoy = envoy
        self._revoke_after = revoke_after
        self._revoking: Timer | None = None
        self._prepare_until: float | None = None
        self._serving = False  #: new connections come here
        self._superseded: float | None = None  #: since when they come to a successor
        self._until: float | None = None  #: the process is to end
        self._began_to_end = 0.0
        self._alone = False  #: and nobody has taken over

    def start(self) -> None:
        """:raises OSError: there is no listening for Envoy."""
        if self._envoy is not None:
            self.handoffs.listen_for_envoy()
        self.agent.start()

    def ready(self) -> bool | str:
        """For the readiness probe; called by another thread."""
        if not self.mesh.synced:
            return "no configuration from the controller yet"
        if not self.agent.connected:
            return "the agent is not connected"
        if self._until is not None:
            return "ending"
        if not self._serving and self._superseded is None:
            return "not serving yet"
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
        if self._revoke_after == 0:
            self._revoke()
        elif self._revoke_after is not None and self._revoking is None:
            # For later changes too, until then.
            self._revoking = self.loop.later(self._revoke_after, self._revoke)
        return errors

    def _revoke(self) -> None:
        self._revoking = None
        self.inbound.judge_again()
        self.tunnels.judge_again()

    # --- pods --------------------------------------------------------------------------------------------------------

    def on_pod(self, pod: Pod) -> None:
        self.certificates.enroll(pod.uid, pod.identity)

    def on_listener(self, pod: Pod, kind: ListenerKind, listener: socket.socket) -> None:
        if self._alone:
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
        destination = (found.destination_address, found.destination_port)
        if kind is ListenerKind.OUTBOUND_L7:
            assert self._envoy is not None
            self.handoffs.to_envoy(pod, sock, client, destination, self._envoy)
            return
        Tunnel(self.tunnels, pod, sock, client, destination, service=service).start()

    # --- one process after another -----------------------------------------------------------------------------------

    def on_known(self) -> None:
        """The pods are known: get ready, and then serve."""
        if self._prepare_until is None:
            self._prepare_until = self.loop.now + PREPARE
            self._prepare()

    def _prepare(self) -> None:
        assert self._prepare_until is not None
        missing = [pod.uid for pod in self.agent.pods.values() if self.certificates.get(pod.uid) is None]
        # Without a word from the controller it serves only where nobody else does, and refuses what comes after a wait.
        if not self.mesh.synced or (missing and self.loop.now < self._prepare_until):
            self.loop.later(_LOOK, self._prepare)
            return
        if missing:
            _log.warning("serving without some certificates", pods=len(missing), first=missing[0])
        self.agent.serve()

    def on_serving(self) -> None:
        _log.info("serving", pods=len(self.agent.pods))
        self._serving = True
        self._superseded = None
        if not self._alone:
            self._take_socket()

    def _take_socket(self) -> None:
        try:
            self.handoffs.listen(self._socket)
        except OSError as error:
            _log.error("handed-over streams cannot be taken", socket=str(self._socket), reason=str(error))
            self.loop.later(1.0, lambda: self._take_socket() if self._serving else None)

    def on_drain(self) -> None:
        """A successor serves: what is open goes on here, what is on its way too, and peers are asked to go there."""
        if self._superseded is not None:
            return
        _log.info("a successor serves", tunnels=len(self.tunnels.open), inbound=len(self.inbound.open))
        self._serving = False
        self._superseded = self.loop.now
        for link in self.inbound.links():
            link.warn()
        self.loop.later(WARNING, self._say_goodbye)

    def _say_goodbye(self) -> None:
        if self._superseded is None:
            return
        for link in self.inbound.links():
            if link.open and not link.core.closing:
                link.shutdown()
        # Also to those that were on their way.
        self.loop.later(WARNING, self._say_goodbye)

    def drain(self, deadline: float) -> None:
        """End with the last connection, at most ``deadline`` seconds from now; without a successor :data:`ALONE` seconds."""
        if self._until is not None:
            return
        self._began_to_end = self.loop.now
        self._until = self.loop.now + deadline
        if self._superseded is None:
            self._alone = True
            self.handoffs.stop()
            for pod in self.agent.pods.values():
                for listener in pod.listeners.values():
                    self.loop.close(listener)
                pod.listeners.clear()
            for link in self.links():
                link.shutdown()
        self._drained()

    def _drained(self) -> None:
        assert self._until is not None
        open_now = self.tunnels.open or self.inbound.open or self.inbound.waiting or self.handoffs.pairs
        busy = open_now or any(link.open and link.core.tail for link in self.links())
        until = self._until
        if self._superseded is not None:
            busy = busy or self.loop.now < self._superseded + LINGER
        elif self._alone:
            until = min(until, self._began_to_end + ALONE)
        else:
            busy = True  # the successor is gone: there is nobody else
        if busy and self.loop.now < until:
            self.loop.later(_LOOK, self._drained)
            return
        # The end of the process would close sockets as if they had ended: what has not is reset.
        for link in self.links():
            link.close("draining")
        self.tunnels.close("draining")
        self.handoffs.close("draining")
        self.handoffs.stop()
        self.loop.stop()

    def links(self) -> list[Link]:
        return [*self.inbound.links(), *self.pool.links()]

    def state(self) -> dict[str, object]:
        """For the debug page; called by another thread."""
        return {
            "pods": {
                pod.uid: {"addresses": pod.addresses, "listeners": [kind.value for kind in pod.listeners]}
                for pod in list(self.agent.pods.values())
            },
            "certificates": self.certificates.states(),
            "tunnels": self.accounting.open_tunnels(),
            "version": self.mesh.version,
        }
