"""One outbound tunnel: from a pod of this node to an enrolled workload on another.

Owns the steps in order, each bounded in time: who is at the destination, the source pod's certificate, a connection, the
CONNECT and its answer; then the stream and the application's socket become a :class:`nodeproxy.relay.Relay`.
"""

from __future__ import annotations

import collections
import os
import resource
import socket
from collections.abc import Callable

from common import logs
from controlplane.api import Workload
from nodeproxy.accounting import Accounting, Flow, Outcome, Party, Reporter
from nodeproxy.agent_client import Pod
from nodeproxy.api import Status
from nodeproxy.certificates import Certificates
from nodeproxy.h2frames import Code
from nodeproxy.h2headers import authority_of
from nodeproxy.h2sending import Stream
from nodeproxy.link import Link
from nodeproxy.loop import Loop, reset
from nodeproxy.mesh import Mesh
from nodeproxy.pool import Key, Pool, PoolError
from nodeproxy.relay import Relay
from nodeproxy.tls import Credentials

_log = logs.get(__name__)

#: Seconds from the CONNECT to its answer.
ANSWER_TIMEOUT = 25.0
#: Seconds that a destination may stay unknown: the controller's stream may be behind the kernel's tables, on a node that has just
#: started by seconds.
UNKNOWN_PATIENCE = 5.0
#: Seconds between attempts to reach a pod that its node is just taking into the mesh.
JOINING_RETRY = 0.05
#: The part of this process's descriptors that the tunnels of one pod may take: the others of its node want some too.
SHARE = 1 / 2
CLUSTER = "Kubernetes"

STATUS = {
    Outcome.OK: Status.CONNECTED,
    Outcome.DENIED: Status.DENIED,
    Outcome.UNREACHABLE: Status.UNREACHABLE,
    Outcome.TLS: Status.UNREACHABLE,
    Outcome.IDENTITY: Status.IDENTITY,
    Outcome.TIMEOUT: Status.TIMEOUT,
    Outcome.INVALID: Status.INVALID,
    Outcome.RESET: Status.UNREACHABLE,
}

Ready = Callable[[Outcome], None]


def party_of_pod(pod: Pod, mesh: Mesh) -> Party:
    d = pod.described
    workload = mesh.at(d.address)
    zone = workload.zone if workload is not None and workload.uid == d.uid else ""
    return Party(d.workload_name, d.namespace, d.identity, d.app, d.version, zone or "unknown")


def party_of_workload(workload: Workload) -> Party:
    w = workload
    return Party(w.workload_name, w.namespace, w.identity, w.app, w.version, w.zone or "unknown")


class Tunnels:
    """What all tunnels need, and which are open."""

    def __init__(
        self, loop: Loop, mesh: Mesh, certificates: Certificates, pool: Pool, accounting: Accounting
    ) -> None:
        self.loop = loop
        self.mesh = mesh
        self.certificates = certificates
        self.pool = pool
        self.accounting = accounting
        self.open: dict[Tunnel, None] = {}
        self._of: collections.Counter[Pod] = collections.Counter()
        self._most = int(resource.getrlimit(resource.RLIMIT_NOFILE)[0] * SHARE)
        self.waiting: dict[Tunnel, None] = {}  #: for a destination to become known

    def begin(self, tunnel: Tunnel) -> bool:
        """False: its pod has too many already."""
        self.open[tunnel] = None
        self._of[tunnel.pod] += 1
        return self._of[tunnel.pod] <= self._most

    def end(self, tunnel: Tunnel) -> None:
        self.waiting.pop(tunnel, None)
        if tunnel in self.open:
            del self.open[tunnel]
            self._of[tunnel.pod] -= 1
            if not self._of[tunnel.pod]:
                del self._of[tunnel.pod]

    def mesh_changed(self) -> None:
        for tunnel in list(self.waiting):
            tunnel.resolve()

    def judge_again(self) -> None:
        """End every open one that is no longer allowed."""
        verdicts: dict[tuple[str, tuple[str, int]], str] = {}
        for tunnel in list(self.open):
            tunnel.judge_again(verdicts)

    def withdraw(self, pod: Pod) -> None:
        self.close("pod withdrawn", pod)

    def close(self, reason: str, pod: Pod | None = None) -> None:
        """End all, or all of a pod."""
        for tunnel in list(self.open):
            if pod is None or tunnel.pod is pod:
                tunnel.fail(Outcome.UNREACHABLE, reason)


class Tunnel:
    """Use: make it, then :meth:`start`. The socket is its own from the start; ``ready`` is called once."""

    def __init__(
        self,
        tunnels: Tunnels,
        pod: Pod,
        sock: socket.socket,
        client: tuple[str, int],
        destination: tuple[str, int],
        *,
        service: tuple[str, int] | None = None,
        traceparent: str = "",
        ready: Ready | None = None,
    ) -> None:
        """One tunnel that is asked for.

        :param destination: the endpoint chosen.
        :param service: what the application dialled.
        :param ready: gets the outcome before any payload moves. Without it a failure is a reset.
        """
        self.pod = pod
        self._all = tunnels
        self._sock = sock
        self._client = client
        self._destination = destination
        self._service = service
        self._traceparent = traceparent
        self._ready = ready
        self._workload: Workload | None = None
        self._relay: Relay | None = None
        self._link: Link | None = None
        self._stream: Stream | None = None
        self._over = False
        self._again = True
        self._broken = Outcome.RESET  #: what an open tunnel that breaks off counts as
        self._timer = tunnels.loop.later(UNKNOWN_PATIENCE, self._unknown)
        self.flow = Flow(
            Reporter.SOURCE,
            party_of_pod(pod, tunnels.mesh),
            Party(),
            ("", "", ""),
            (authority_of(*client), authority_of(*destination)),
            tunnels.loop.now,
        )

    def start(self) -> None:
        room = self._all.begin(self)
        self._all.accounting.begin(self.flow)
        if not room:
            self.fail(Outcome.UNREACHABLE, "too many connections of one pod")
            return
        self._all.waiting[self] = None
        self.resolve()

    def _unknown(self) -> None:
        self.fail(Outcome.IDENTITY, "source or destination is no workload of the mesh")

    def resolve(self) -> None:
        """Find the destination, now or after the next change of the mesh."""
        workload = self._all.mesh.at(self._destination[0])
        if workload is None or not (workload.enrolled or self._all.mesh.in_passage(workload.uid)):
            return
        own = self._all.mesh.workloads.get(self.pod.uid)
        if own is None:
            return  # Where it may go is not known yet either.
        self._all.waiting.pop(self, None)
        self._workload = workload
        self.flow.destination = party_of_workload(workload)
        # The kernel judged what the application dialled; an endpoint that a proxy chose nobody has judged before.
        if refusal := self._all.mesh.refuses_egress(own, *self._destination):
            self.fail(Outcome.DENIED, refusal)
            return
        if self._service is not None:
            service = self._all.mesh.service_at(*self._service)
            if service is not None:
                self.flow.service = (service.host, service.name, service.namespace)
        # The certificate's patience and the connection's own time-outs bound what follows.
        self._timer.cancel()
        self._all.certificates.wait(self.pod.uid, self._have_certificate)

    def judge_again(self, verdicts: dict[tuple[str, tuple[str, int]], str]) -> None:
        """After a change. ``verdicts`` remembers those of this round."""
        own = self._all.mesh.workloads.get(self.pod.uid)
        if own is None or self._workload is None:
            return
        key = own.uid, self._destination
        if key not in verdicts:
            verdicts[key] = self._all.mesh.refuses_egress(own, *self._destination)
        if verdicts[key]:
            self.fail(Outcome.DENIED, verdicts[key])

    def _have_certificate(self, tls: Credentials | None) -> None:
        if self._over:
            return
        if tls is None:
            self.fail(Outcome.IDENTITY, "no certificate for the source workload")
            return
        assert self._workload is not None
        key = Key(
            self.pod.uid,
            self.pod.netns_cookie,
            tls.svid.identity,
            self._destination[0],
            self._workload.identity,
        )
        self._all.pool.take(self.pod, key, tls, self._have_link)

    def _have_link(self, link: Link | PoolError) -> None:
        if self._over:
            return
        if isinstance(link, PoolError):
            if link.outcome is Outcome.UNREACHABLE and self._is_joining():
                # Nobody listens there yet, and plain text would be the wrong answer to that.
                self._timer = self._all.loop.later(JOINING_RETRY, self._try_again)
                return
            self.fail(link.outcome, link.reason)
            return
        self._link = link
        self._stream = link.core.connect(authority_of(*self._destination), self._fields())
        self._stream.owner = self
        self._timer = self._all.loop.later(ANSWER_TIMEOUT, lambda: self.fail(Outcome.TIMEOUT, "no answer"))
        link.mark()

    def _is_joining(self) -> bool:
        workload = self._all.mesh.at(self._destination[0])
        return workload is not None and workload.enrolled and self._all.mesh.in_passage(workload.uid)

    def _try_again(self) -> None:
        self._all.certificates.wait(self.pod.uid, self._have_certificate)

    def _fields(self) -> list[tuple[bytes, bytes]]:
        """As Istio's ambient mode writes them."""
        d = self.pod.described
        baggage = (
            f"k8s.cluster.name={CLUSTER},k8s.namespace.name={d.namespace},k8s.pod.name={d.name},"
            f"service.name={d.app},service.version={d.version}"
        )
        forwarded = f'for="{authority_of(*self._client)}"'
        if self.flow.service[0]:
            forwarded += f";host={self.flow.service[0]}"
        trace = self._traceparent or f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-00"
        return [
            (b"baggage", baggage.encode("ascii", "replace")),
            (b"forwarded", forwarded.encode("ascii", "replace")),
            (b"traceparent", trace.encode("ascii", "replace")),
        ]

    # --- the stream's owner until the relay takes over ---------------------------------------------------------------

    def on_response(self, status: int) -> None:
        if status == 200:
            self._open()
            return
        outcome = {401: Outcome.DENIED, 403: Outcome.DENIED, 400: Outcome.INVALID}.get(
            status, Outcome.UNREACHABLE
        )
        self.fail(outcome, f"HBONE status {status}")

    def on_data(self, data: memoryview) -> None:
        """Nothing comes before the response (the core sees to it)."""

    def on_end(self) -> None:
        """The end of a refusal: on_response has dealt with it."""

    def on_window(self) -> None:
        pass

    def on_reset(self, code: Code) -> None:
        self._stream = None
        if code is Code.REFUSED_STREAM and self._again and not self._over:
            # The peer did not process it (GOAWAY, or a limit we did not know yet): once more, elsewhere.
            self._again = False
            self._timer.cancel()
            self._all.certificates.wait(self.pod.uid, self._have_certificate)
            return
        self.fail(Outcome.TLS, f"stream reset: {code.name}")

    # --- open and over -----------------------------------------------------------------------------------------------

    def _open(self) -> None:
        assert self._link is not None and self._stream is not None
        self._timer.cancel()
        if self._ready is not None:
            self._ready(Outcome.OK)
        self._relay = Relay(self._all.loop, self._link, self._stream, self._sock, self._done)
        self.flow.counts = self._relay

    def _done(self, _relay: Relay, reason: str) -> None:
        self._over = True
        self._all.end(self)
        self._all.accounting.end(self.flow, self._broken if reason else Outcome.OK, reason)

    def fail(self, outcome: Outcome, reason: str) -> None:
        """End it, whatever state it is in."""
        if self._over:
            return
        if self._relay is not None:
            if outcome is Outcome.DENIED:
                self._broken = outcome
            self._relay.abort(reason, Code.CANCEL)
            return
        self._over = True
        self._timer.cancel()
        self._all.end(self)
        if self._stream is not None and self._link is not None:
            self._link.reset(self._stream, Code.CANCEL)
            self._link.stream_done()
        self._all.accounting.end(self.flow, outcome, reason)
        if self._ready is not None:
            self._ready(outcome)
            self._all.loop.close(self._sock)
        else:
            reset(self._all.loop, self._sock)
