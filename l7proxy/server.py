"""The proxy as a whole: its configuration, its pods, and what every request shares.

Owns the lives of listeners and connections (enrolment, withdrawal, draining) and the one assignment that swaps the
configuration. How a request is served is :mod:`l7proxy.stream`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable
from random import Random
from time import monotonic
from typing import Any

from agent import api
from bpf.maps import CapturedMap, MapError
from bpf.wire import PORT_OUTBOUND_L7
from common import logs
from common.tasks import Tasks
from l7proxy.accesslog import AccessLog
from l7proxy.agent_client import AgentClient, Captured
from l7proxy.balancer import Balancer
from l7proxy.connector import Connector
from l7proxy.downstream import DownstreamConnection
from l7proxy.errors import ProtocolError
from l7proxy.headers import RequestIds
from l7proxy.metrics import Metrics
from l7proxy.model import EMPTY, Config, Destination, Endpoint, host_port
from l7proxy.pods import Pod, PodKey
from l7proxy.pool import HostPool
from l7proxy.record import Record
from l7proxy.stream import Stream
from l7proxy.timers import Wheel

_log = logs.get(__name__)

#: Seconds after an agent's return in which it must speak of a pod, or the pod is gone.
_CONFIRM_LIMIT = 15.0
_SWEEP = 5.0
#: Seconds that a new process waits for the controller, when it has a configuration from an earlier time, or a part of one.
PREPARE = 5.0
#: Seconds that an idle connection is kept for a last request while a successor takes new ones, and when there is none.
IDLE, IDLE_ALONE = 15.0, 0.2
#: Seconds that requests under way have at the end when no successor takes new connections meanwhile.
ALONE = 10.0
#: Seconds that a destination is served after it has gone from the configuration: by the kernel's tables it goes another way
#: then, but those change when the agent hears of it.
RETIRED = 10.0
#: Seconds that a listener is kept when a newer one has come in its place.
LINGER = 3.0
_LOOK = 0.1
_SO_COOKIE = 57
_FLUSH = 1.0
#: Seconds between two log lines of one cause.
_LOG_INTERVAL = 10.0


class Proxy:
    """``access_log`` None: none is written. ``captured`` finds what was dialled (None: in the agent's map)."""

    def __init__(
        self,
        *,
        node: str,
        run: str,
        access_log: AccessLog | None,
        random: Random | None = None,
        captured: Captured | None = None,
    ) -> None:
        self.node = node
        self.config: Config = EMPTY
        self.random = random or Random(os.urandom(16))
        self.balancer = Balancer(self.random)
        self.loop = asyncio.get_running_loop()
        self.wheel = Wheel(self.loop)
        self.metrics = Metrics()
        self.request_ids = RequestIds()
        self.pods: dict[PodKey, Pod] = {}
        #: whether the configuration is the controller's of now, all of it
        self.waiting: set[Stream] = set()  #: requests to destinations of which nothing is known (yet)
        self.fresh: Callable[[], bool] = lambda: True
        self.keep: Callable[[], None] = lambda: None  #: writes the last good configuration, in a thread
        self.serving = False  #: new connections come here
        self.draining = False  #: they should not come back: responses say so
        self._superseded: float | None = None  #: since when they come to a successor
        self._alone = False  #: the process ends, and nobody has taken over
        self._known = False
        self.connections = 0
        self.retries = 0
        self.tasks = Tasks()
        self.connector = Connector(node, f"{run}/nodeproxy/nodeproxy.sock", self.tasks)
        self.agent = AgentClient(f"{run}/agent.sock", self)
        self._access_log = access_log
        self._find_captured = captured
        self._captured: CapturedMap | None = None
        self._unconfirmed: set[PodKey] = set()
        self._confirm_by: asyncio.TimerHandle | None = None
        self._wanted: dict[str, Endpoint] = {}  #: of the configuration, by their keys
        #: destinations that have just gone, with the last configuration that had them, and until when that serves
        self._retired: dict[tuple[str, int], tuple[Config, float]] = {}
        self._connection_gone = asyncio.Event()
        self._logged: dict[tuple[str, str], float] = {}
        self._expose()

    def start(self) -> None:
        self.tasks.start(self.agent.run(), name="agent client")
        self.tasks.start(self._housekeeping(), name="housekeeping")

    # -- configuration -----------------------------------------------------------------------------------------------

    def publish(self, config: Config) -> None:
        """Requests that begin from now on are served by ``config``."""
        before, self.config = self.config, config
        until = monotonic() + RETIRED
        for gone in before.hosts.keys() - config.hosts.keys():
            self._retired[gone] = before, until
        for back in self._retired.keys() & config.hosts.keys():
            del self._retired[back]
        for stream in self.waiting:
            self.loop.call_soon(stream.on_configuration)
        self.balancer.keep(config.endpoints)
        self._wanted = {e.key: e for endpoints in config.endpoints.values() for e in endpoints}
        for pod in self.pods.values():
            for key, pool in pod.pools.items():
                if key in self._wanted:
                    pool.describe(self._wanted[key])
        _log.debug("configuration swapped", version=config.version, destinations=len(config.hosts))

    def destination(self, original: tuple[str, int]) -> tuple[Config, Destination | None]:
        """Who serves what was dialled by the newest configuration, or for a while by the last that knew it."""
        found = self.config.destination(*original)
        if found is None:
            config, until = self._retired.get(original, (self.config, 0.0))
            if monotonic() < until:
                return config, config.destination(*original)
        return self.config, found

    # -- what requests share -----------------------------------------------------------------------------------------

    def on_record(self, record: Record) -> None:
        """A request is over."""
        self.metrics.add(record)
        if self._access_log is not None:
            self._access_log.add(record)

    def connection_gone(self) -> None:
        """A downstream connection ended."""
        self._connection_gone.set()

    def new_pool(self, pod: Pod, endpoint: Endpoint) -> HostPool:
        tunnelled = self.connector.tunnelled(endpoint.node, endpoint.enrolled)
        ages = self.connector.elsewhere(endpoint.node)
        pool = HostPool(pod, endpoint, tunnelled, self.connector.connect, ages=ages)
        pod.pools[endpoint.key] = pool
        return pool

    def original_destination(self, netns_cookie: int, peer: tuple[str, int]) -> tuple[str, int] | None:
        """What the peer of an accepted connection dialled."""
        if self._find_captured is not None:
            return self._find_captured(netns_cookie, peer)
        if self._captured is None:
            return None
        try:
            found = self._captured.find(netns_cookie, peer[0], peer[1], PORT_OUTBOUND_L7)
        except (MapError, OSError) as error:
            _log.error("captured map not readable", reason=str(error))
            return None
        return None if found is None else (found.destination_address, found.destination_port)

    # -- what is worth a line ----------------------------------------------------------------------------------------

    def uncaptured(self, pod: Pod, peer: object) -> None:
        self._warn("connection without an original destination closed", pod.enroll.name, peer=peer)

    def too_many(self, pod: Pod) -> None:
        self._warn("a pod has too many connections, further ones are closed", pod.enroll.name)

    def unserved(self, connection: DownstreamConnection) -> None:
        destination = host_port(*connection.original)
        self._warn(
            "no configuration for a destination, answered 503", destination, pod=connection.pod.enroll.name
        )

    def no_cluster(self, connection: DownstreamConnection, cluster: str) -> None:
        destination = host_port(*connection.original)
        self._warn("route to a cluster that does not exist, answered 503", cluster, destination=destination)

    def bad_request(self, connection: DownstreamConnection, error: ProtocolError) -> None:
        _log.debug("bad request", pod=connection.pod.enroll.name, reason=error.reason, status=error.status)

    def _warn(self, event: str, key: str, **fields: object) -> None:
        """Log an event once in :data:`_LOG_INTERVAL` for each key: traffic repeats causes."""
        now = monotonic()
        if now - self._logged.get((event, key), -_LOG_INTERVAL) < _LOG_INTERVAL:
            return
        if len(self._logged) > 1000:
            self._logged.clear()
        self._logged[event, key] = now
        _log.warning(event, subject=key, **fields)

    # -- the agent's messages ----------------------------------------------------------------------------------------

    def held(self) -> tuple[api.Held, ...]:
        kind = api.ListenerKind.OUTBOUND_L7
        return tuple(
            api.Held(uid, cookie, kind, pod.listener)
            for (uid, cookie), pod in self.pods.items()
            if pod.server is not None
        )

    def on_maps(self, maps: dict[str, int]) -> None:
        for name, fd in maps.items():
            if name != "captured":
                os.close(fd)
                continue
            previous, self._captured = self._captured, CapturedMap(fd)
            if previous is not None:
                previous.close()
        self._unconfirmed = {key for key, pod in self.pods.items() if not pod.left}
        if self._confirm_by is not None:
            self._confirm_by.cancel()  # an earlier agent's time is not this one's
        self._confirm_by = self.loop.call_later(_CONFIRM_LIMIT, self._drop_unconfirmed)

    def _drop_unconfirmed(self) -> None:
        if not self.agent.connected:
            return
        for key in self._unconfirmed:
            if (pod := self.pods.pop(key, None)) is not None:
                pod.withdraw()
        self._unconfirmed = set()

    def on_enroll(self, message: api.Enroll, listeners: dict[api.ListenerKind, socket.socket]) -> None:
        key = (message.uid, message.netns_cookie)
        self._unconfirmed.discard(key)
        pod = self.pods.get(key)
        if pod is None:
            pod = self.pods[key] = Pod(message, lambda count, ipv6: self.agent.get_sockets(key, count, ipv6))
            _log.info(
                "pod enrolled",
                uid=message.uid,
                pod=f"{message.namespace}/{message.name}",
                addresses=",".join(message.own),
            )
        elif pod.enroll != message:
            pod.describe(message)
        pod.left = False
        pod.replenish()
        for kind, sock in listeners.items():
            if kind is not api.ListenerKind.OUTBOUND_L7 or self._alone:
                sock.close()
            else:
                self.tasks.start(self._listen(pod, sock), name=f"listen {message.name}")

    async def _listen(self, pod: Pod, sock: socket.socket) -> None:
        sock.setblocking(False)
        listener = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)
        server = await self.loop.create_server(
            lambda: DownstreamConnection(self, pod), sock=sock, backlog=1024
        )
        if pod.withdrawn or self._alone:
            server.close()
            return
        if pod.server is not None:
            pod.replaced.append(pod.server)
            self.loop.call_later(LINGER, pod.server.close)
        pod.server = server
        pod.listener = listener

    def on_withdraw(self, message: api.Withdraw) -> None:
        key = (message.uid, message.netns_cookie)
        if message.drain:
            if (pod := self.pods.get(key)) is not None:
                pod.leave()
            return
        pod = self.pods.pop(key, None)
        if pod is not None:
            pod.withdraw()

    def on_sockets(
        self, key: PodKey, count: int, found: list[socket.socket], error: str, *, ipv6: bool
    ) -> None:
        pod = self.pods.get(key)
        if pod is None:
            for sock in found:
                sock.close()
            return
        if error:
            self._warn("agent gives no sockets", pod.enroll.name, reason=error)
        pod.sockets(ipv6=ipv6).arrived(count, found, error)

    def on_agent_lost(self) -> None:
        for pod in self.pods.values():
            pod.agent_lost()

    # -- one process after another -----------------------------------------------------------------------------------

    def on_known(self) -> None:
        if not self._known:
            self._known = True
            # Its folder is the agent's to make, and may not have been there.
            self.tasks.start(asyncio.to_thread(self.keep), name="keep configuration")
            self._prepare(monotonic() + PREPARE)

    def _prepare(self, until: float) -> None:
        """Serve with a configuration: the controller's, or if it is away the last good one."""
        if self.config.version == "" or (not self.fresh() and monotonic() < until):
            self.loop.call_later(_LOOK, self._prepare, until)
        else:
            self.agent.serve()

    def on_serving(self) -> None:
        _log.info("serving", pods=len(self.pods))
        self.serving = True
        self._superseded = None
        self.draining = self._alone

    def on_drain(self) -> None:
        """A successor serves: what is open goes on here, and each connection ends with its next response."""
        if self._superseded is None:
            _log.info(
                "a successor serves", connections=sum(len(pod.downstream) for pod in self.pods.values())
            )
            self.serving = False
            self._superseded = monotonic()
            self.draining = True

    # -- time --------------------------------------------------------------------------------------------------------

    async def _housekeeping(self) -> None:
        next_sweep = monotonic() + _SWEEP
        renewals = 0
        while True:
            await asyncio.sleep(_FLUSH)
            if self._access_log is not None:
                self._access_log.flush()
            now = monotonic()
            for pod in self.pods.values():
                pod.replenish()
            if self.connector.node_proxy_changed():
                renewals = 3  # also for what was being connected
            if renewals:
                renewals -= 1
                self._renew()
            if now >= next_sweep:
                next_sweep = now + _SWEEP
                self._sweep(now)

    def _sweep(self, now: float) -> None:
        for gone in [key for key, (_, until) in self._retired.items() if until <= now]:
            del self._retired[gone]
        for pod in self.pods.values():
            for key, pool in list(pod.pools.items()):
                wanted = key in self._wanted
                if pool.sweep(now, wanted=wanted) and not wanted:
                    del pod.pools[key]
            for connection in list(pod.downstream):
                connection.check_idle(now)

    def _renew(self) -> None:
        """The node proxy that carries connections to other nodes ends one day: requests go through its successor."""
        for pod in self.pods.values():
            for pool in pod.pools.values():
                if pool.ages:
                    pool.renew()

    def reopen_access_log(self) -> None:
        if self._access_log is not None:
            self._access_log.reopen()

    async def drain(self, deadline: float) -> None:
        """End with the last connection, at most ``deadline`` seconds from now; without a successor :data:`ALONE` seconds."""
        began = monotonic()
        if self._superseded is None:
            self._alone = True
            for pod in self.pods.values():
                pod.close_servers()
        self.draining = True
        while True:
            now = monotonic()
            idle = IDLE_ALONE if self._alone else IDLE
            connections = [connection for pod in self.pods.values() for connection in pod.downstream]
            if now >= began + (min(deadline, ALONE) if self._alone else deadline):
                break
            if self._superseded is not None:
                self._alone = False
                if not connections and now >= self._superseded + LINGER:
                    break
            elif self._alone and not connections:
                break
            for connection in connections:
                if now - connection.touched >= idle:
                    connection.close_if_idle()
            self._connection_gone.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK):
                    await self._connection_gone.wait()
        for pod in list(self.pods.values()):
            pod.withdraw()
        self.pods.clear()
        # Aborted transports report their end in the next turn of the loop.
        await asyncio.sleep(0.05)
        await self.tasks.cancel()
        self.wheel.close()
        if self._access_log is not None:
            self._access_log.close()
        if self._captured is not None:
            self._captured.close()
            self._captured = None

    # -- what can be seen --------------------------------------------------------------------------------------------

    def _expose(self) -> None:
        add = self.metrics.value
        add(
            "mycel_l7proxy_downstream_connections",
            "Connections accepted.",
            "counter",
            lambda: self.connections,
        )
        add("mycel_l7proxy_upstream_retries", "Attempts repeated.", "counter", lambda: self.retries)
        add(
            "mycel_l7proxy_connect_failures",
            "Upstream connections that failed.",
            "counter",
            lambda: self.connector.failures,
        )
        add("mycel_l7proxy_pods", "Enrolled pods.", "gauge", lambda: len(self.pods))
        add(
            "mycel_l7proxy_agent_connected",
            "1 while the agent is there.",
            "gauge",
            lambda: float(self.agent.connected),
        )
        log = self._access_log
        if log is not None:
            add("mycel_l7proxy_access_log_lines", "Lines written or waiting.", "counter", lambda: log.lines)
            add(
                "mycel_l7proxy_access_log_dropped",
                "Lines lost: the writer fell behind.",
                "counter",
                lambda: log.dropped,
            )

    def describe(self) -> dict[str, Any]:
        """For the admin page ``/config``."""
        config = self.config
        return {
            "version": config.version,
            "destinations": {host_port(a, p): d.manager.route_name for (a, p), d in config.hosts.items()},
            "clusters": {name: [e.host for e in found] for name, found in config.endpoints.items()},
            "pods": [f"{pod.enroll.namespace}/{pod.enroll.name}" for pod in list(self.pods.values())],
        }
