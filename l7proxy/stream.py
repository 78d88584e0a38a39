"""One request and its response: routing, attempts, retries, timeouts, and what goes where.

Owns the request's state (its table: :data:`l7proxy.states.TABLE`) and its record. Decisions are made by the matcher, the
balancer, the pool and the retry state; connections carry them out. Whatever happens, the record is closed exactly once,
in :meth:`Stream._finish`.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from l7proxy import headers
from l7proxy.errors import FLAG_RETRIES_EXHAUSTED, REPLIES, Failure
from l7proxy.http1.head import CHUNKED, Fields, RequestHead, ResponseHead
from l7proxy.http1.path import normalize
from l7proxy.matcher import choose_cluster, find_route, redirect_location
from l7proxy.model import Cluster, HttpManager, LbPolicy, Route, WeightedCluster
from l7proxy.record import Record
from l7proxy.retry import IDEMPOTENT, Decision, RetryState
from l7proxy.states import TABLE, Event, State

if TYPE_CHECKING:
    from l7proxy.downstream import DownstreamConnection
    from l7proxy.pool import HostPool
    from l7proxy.timers import Timer
    from l7proxy.upstream import UpstreamConnection

#: Most bytes of a request's body that are held for another attempt (Envoy: per_connection_buffer_limit_bytes).
REPLAY_LIMIT = 1024 * 1024
#: Bytes of body that may wait for a connection before the client is paused.
WAITING_LIMIT = 64 * 1024
#: Seconds that a destination may stay unknown: the kernel's tables may be ahead of this proxy's configuration.
UNKNOWN_PATIENCE = 2.0


class Stream:
    __slots__ = (
        "_attempt_started", "_attempts", "_body", "_body_size", "_chunked", "_close_after", "_config",
        "_host", "_out", "_per_try_timer", "_replayable", "_retried_stale", "_retry", "_timer", "_tried",
        "_until_close", "choice", "cluster", "downstream", "head", "manager", "record", "request_complete",
        "route", "state", "upstream",
    )  # fmt: skip

    cluster: Cluster
    route: Route
    choice: WeightedCluster
    manager: HttpManager

    def __init__(
        self, downstream: DownstreamConnection, head: RequestHead, *, request_complete: bool
    ) -> None:
        self.downstream = downstream
        self.head = head
        self.request_complete = request_complete
        self.record = Record(downstream.proxy.on_record, downstream.pod, head)
        self.state = State.NEW
        self.upstream: UpstreamConnection | None = None
        self._config = downstream.proxy.config
        self._host: HostPool | None = None
        self._body: list[bytes] = []
        self._body_size = 0
        self._replayable = True
        self._retry: RetryState | None = None
        self._retried_stale = False
        self._tried: set[str] | None = None
        self._timer: Timer | None = None
        self._per_try_timer: Timer | None = None
        self._attempts = 0
        self._attempt_started = 0.0
        self._out: list[bytes] = []
        self._chunked = False
        self._close_after = False
        self._until_close = False  #: the response has no end but the connection's

    def _go(self, event: Event) -> None:
        self.state = TABLE[self.state][event]

    # -- the request -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Route the request and begin its first attempt (or answer it)."""
        head, downstream = self.head, self.downstream
        proxy = downstream.proxy
        self._config, destination = downstream.destination()
        if destination is None or destination.routes is None:
            if self._timer is None:
                self._timer = proxy.wheel.schedule(UNKNOWN_PATIENCE, self._unserved)
                proxy.waiting.add(self)
            return
        self._cancel_timers()
        manager = self.manager = destination.manager
        if head.odd_path and manager.normalize_path:
            head = self.head = self._normalized(head)
        if head.expects_continue and not self.request_complete:
            downstream.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        random = proxy.random.getrandbits(32)
        route = find_route(destination.routes, head, random)
        if route is None:
            self.fail(Failure.NO_ROUTE)
            return
        self.route = route
        if not route.clusters and self._answered_by_route(route):
            return
        choice = choose_cluster(route, head, random)
        cluster = self._config.clusters.get(choice.name) if choice is not None else None
        if choice is None or cluster is None:
            proxy.no_cluster(downstream, choice.name if choice is not None else "")
            self.fail(Failure.NO_CLUSTER, status=route.cluster_not_found)
            return
        if head.method == b"CONNECT" or (head.upgrade and head.upgrade not in self.manager.upgrades):
            self.fail(Failure.UPGRADE_REFUSED)
            return
        self.choice = choice
        self.cluster = self.record.cluster = cluster
        if route.retry is not None:
            self._retry = RetryState(route.retry, proxy.random)
        self._request_id(head)
        if self.request_complete:
            self._arm_timeout()
        self._attempt()

    def on_configuration(self) -> None:
        """There is a new one, and this request is waiting for it."""
        if self.state == State.NEW:
            self.start()

    def _unserved(self) -> None:
        self.downstream.proxy.unserved(self.downstream)
        self.fail(Failure.NO_CONFIGURATION)

    def _normalized(self, head: RequestHead) -> RequestHead:
        path = normalize(head.path, merge_slashes=self.manager.merge_slashes)
        return head if path == head.path else head.with_path(path)

    def _request_id(self, head: RequestHead) -> None:
        given = head.values.get(b"x-request-id")
        if given is not None:
            self.record.request_id = given
        elif self.manager.generate_request_id:
            self.record.request_id = self.downstream.proxy.request_ids.next()

    def _answered_by_route(self, route: Route) -> bool:
        if route.redirect is not None:
            location = redirect_location(route.redirect, route, self.head).encode("latin-1", "replace")
            self._reply(route.redirect.status, b"", extra=b"location: %b\r\n" % location)
        elif route.direct is not None:
            self._reply(route.direct.status, route.direct.body)
        else:
            return False
        return True

    def on_request_data(self, data: bytes) -> None:
        self.record.received += len(data)
        if self.state == State.DONE:
            return
        self._send_body(headers.chunk(data) if self.head.length == CHUNKED else data)

    def on_request_end(self, trailers: Fields) -> None:
        self.request_complete = True
        if self.state == State.DONE:
            return
        if self.head.length == CHUNKED:
            self._send_body(headers.last_chunk(trailers))
        if self.state == State.NEW:
            return  # and there is no route yet, which has the timeout
        self._arm_timeout()
        if self.state == State.SENT:
            self._arm_per_try_timeout()

    def _send_body(self, piece: bytes) -> None:
        upstream = self.upstream
        if upstream is not None:
            upstream.transport.write(piece)
            if not self._replayable:
                return
            if not self._may_repeat() or self._body_size + len(piece) > REPLAY_LIMIT:
                self._replayable = False
                self._body.clear()
                return
        self._body.append(piece)
        self._body_size += len(piece)
        if upstream is None and self._body_size > WAITING_LIMIT:
            self.downstream.hold("connection")

    def _may_repeat(self) -> bool:
        return self._retry is not None or self.head.method in IDEMPOTENT

    # -- attempts ----------------------------------------------------------------------------------------------------

    def _attempt(self, *, fresh: bool = False) -> None:
        self._go(Event.ATTEMPT)
        proxy, cluster, retry = self.downstream.proxy, self.cluster, self.route.retry
        if self._tried and retry is not None:
            endpoint = proxy.balancer.pick(self._config, cluster, self._tried, retry.host_selection_attempts)
        else:
            endpoint = proxy.balancer.pick(self._config, cluster)
        if endpoint is None:
            self.fail(Failure.NO_HEALTHY_UPSTREAM)
            return
        if retry is not None and retry.avoid_previous_hosts:
            self._tried = (self._tried or set()) | {endpoint.key}
        self._attempts += 1
        pod = self.downstream.pod
        host = pod.pools.get(endpoint.key)
        if host is None:
            host = proxy.new_pool(pod, endpoint)
        self._host = self.record.host = host
        if cluster.lb_policy is LbPolicy.LEAST_REQUEST:
            proxy.balancer.active[endpoint.key] += 1
        got = host.acquire(self, cluster, self.downstream.peer[1], fresh=fresh)
        if got is None:
            return
        if isinstance(got, Failure):
            self.on_connection_failure(got, "")
        else:
            self.on_connection(got)

    def on_connection(self, connection: UpstreamConnection) -> None:
        self._go(Event.CONNECTED)
        self.upstream = connection
        self._attempt_started = perf_counter()
        head, route, record = self.head, self.route, self.record
        connection.begin(self, head.method)
        manager = self.manager
        lines = headers.request_prefix(
            head, route, self.choice, manager, self.downstream.peer[0], connection.pool.endpoint.host
        )
        if manager.generate_request_id and b"x-request-id" not in head.values:
            lines = b"%bx-request-id: %b\r\n" % (lines, record.request_id)
        if route.attempt_count or route.timeout:
            lines += headers.attempt_lines(route, self._attempts, self._expected_timeout())
        if self._body:
            connection.transport.write(b"%b\r\n%b" % (lines, b"".join(self._body)))
        else:
            connection.transport.write(lines + b"\r\n")
        downstream = self.downstream
        if self._body_size > REPLAY_LIMIT or not self._may_repeat():
            self._replayable = False
            self._body.clear()
        if downstream.held:
            downstream.release("connection")
        if connection.write_paused:
            downstream.hold("upstream")
        if downstream.write_paused:
            connection.transport.pause_reading()
        if self.request_complete:
            self._arm_per_try_timeout()

    def _expected_timeout(self) -> float:
        route = self.route
        per_try = route.retry.per_try_timeout if route.retry is not None else 0.0
        if per_try and (not route.timeout or per_try < route.timeout):
            return per_try
        return route.timeout

    def on_connection_failure(self, failure: Failure, detail: str) -> None:
        """The pool has no connection for this attempt, and will not have one."""
        self._leave_upstream()
        self._retry_or_fail(failure, detail, started=False)

    def on_upstream_failure(self, failure: Failure, detail: str) -> None:
        """The attempt's connection broke, or what came from it is no response."""
        upstream = self.upstream
        stale = (
            failure is Failure.CONNECTION_TERMINATION
            and upstream is not None
            and upstream.exchanges > 1
            and not upstream.received
        )
        self._leave_upstream()
        if self.state == State.RESPONDING:
            self._break(failure)
        elif stale and not self._retried_stale and self._replayable and self.head.method in IDEMPOTENT:
            # The server closed an idle connection as we reused it (RFC 9112, section 9.3.1): no attempt in Envoy's sense.
            self._retried_stale = True
            self._attempts -= 1
            self._attempt(fresh=True)
        else:
            self._retry_or_fail(failure, detail, started=True)

    def _retry_or_fail(self, failure: Failure, detail: str, *, started: bool) -> None:
        if self._retry is not None and self._replayable:
            decision = self._retry.on_failure(failure, request_started=started)
            if decision is Decision.RETRY:
                self._retry_later(self._retry)
                return
            if decision is Decision.EXHAUSTED:
                self.fail(failure, detail, exhausted=True)
                return
        self.fail(failure, detail)

    def _retry_later(self, retry: RetryState) -> None:
        self._go(Event.ATTEMPT)
        proxy = self.downstream.proxy
        proxy.retries += 1
        self._cancel_per_try()
        self._per_try_timer = proxy.wheel.schedule(retry.delay(), self._attempt)

    def _leave_upstream(self, *, finish: bool = False, flush: bool = False) -> None:
        """Give up the connection, or the wait for one, of the attempt under way.

        :param finish: the response is complete: the connection may go back to its pool.
        :param flush: what was written to it is still to arrive.
        """
        host, self._host = self._host, None
        upstream, self.upstream = self.upstream, None
        if host is None:
            return
        if self.cluster.lb_policy is LbPolicy.LEAST_REQUEST:
            active = self.downstream.proxy.balancer.active
            active[host.endpoint.key] -= 1
            if active[host.endpoint.key] <= 0:
                del active[host.endpoint.key]
        if upstream is None:
            host.forget(self)
            return
        if self.downstream.write_paused and upstream.open:
            upstream.transport.resume_reading()
        self.downstream.release("upstream")
        if finish:
            upstream.finish(request_complete=self.request_complete)
        else:
            upstream.stream = None
            if flush:
                upstream.close()
            else:
                upstream.abort()

    # -- time --------------------------------------------------------------------------------------------------------

    def _arm_timeout(self) -> None:
        if self.route.timeout:
            self._timer = self.downstream.proxy.wheel.schedule(self.route.timeout, self._on_timeout)

    def _arm_per_try_timeout(self) -> None:
        retry = self.route.retry
        if retry is not None and retry.per_try_timeout:
            self._cancel_per_try()
            self._per_try_timer = self.downstream.proxy.wheel.schedule(
                retry.per_try_timeout, self._on_per_try_timeout
            )

    def _cancel_per_try(self) -> None:
        if self._per_try_timer is not None:
            self._per_try_timer.cancel()
            self._per_try_timer = None

    def _on_timeout(self) -> None:
        self._leave_upstream()
        if self.state in (State.RESPONDING, State.TUNNEL):
            self._break(Failure.TIMEOUT)
        else:
            self.fail(Failure.TIMEOUT)

    def _on_per_try_timeout(self) -> None:
        self._per_try_timer = None
        self._leave_upstream()
        self._retry_or_fail(Failure.PER_TRY_TIMEOUT, "", started=True)

    # -- the response ------------------------------------------------------------------------------------------------

    def on_response_head(self, head: ResponseHead, *, complete: bool = False) -> None:
        """``complete``: the rest of the response is here already, so its connection is clean if it is given up."""
        self._cancel_per_try()
        retry = self._retry
        if retry is not None:
            decision = retry.on_response(head)
            if decision is Decision.RETRY and self._replayable:
                self._leave_upstream(finish=complete)
                self._retry_later(retry)
                return
            if decision is Decision.EXHAUSTED:
                self.record.add_flag(FLAG_RETRIES_EXHAUSTED)
        self._go(Event.HEAD)
        record = self.record
        record.status = head.status
        record.service_time = int((perf_counter() - self._attempt_started) * 1000)
        request = self.head
        self._close_after = (
            not request.keep_alive
            or self.downstream.proxy.draining
            or self.downstream.leaving
            or (head.length < 0 and not request.minor)
        )
        data, self._chunked = headers.response_head(
            head, request, self.route, self.choice, record.service_time, close=self._close_after
        )
        self._until_close = head.length < 0 and not self._chunked
        self._out.append(data)

    def on_response(self, head: ResponseHead, body: bytes) -> None:
        """A complete response at once."""
        self.on_response_head(head, complete=True)
        if self.state == State.RESPONDING:
            if body:
                self.on_response_data(body)
            self.on_response_end(())

    def on_response_data(self, data: bytes) -> None:
        self.record.sent += len(data)
        self._out.append(headers.chunk(data) if self._chunked else data)

    def flush(self) -> None:
        """Write what was collected of the response: one write for what one read brought."""
        out = self._out
        if out:
            self.downstream.write(out[0] if len(out) == 1 else b"".join(out))
            out.clear()

    def on_response_end(self, trailers: Fields) -> None:
        if self._chunked:
            self._out.append(headers.last_chunk(trailers))
        self.flush()
        self._leave_upstream(finish=True)
        self._finish(close=self._close_after or not self.request_complete)

    def on_switch(self, head: ResponseHead, rest: bytes) -> None:
        """101: from here on both sides are bytes."""
        self._cancel_timers()
        self._go(Event.SWITCH)
        self.record.status = 101
        self.record.service_time = int((perf_counter() - self._attempt_started) * 1000)
        self.downstream.write(headers.switching_head(head))
        if rest:
            self.on_tunnel_data(rest)
        self.downstream.begin_tunnel()

    def on_tunnel_data(self, data: bytes) -> None:
        self.record.sent += len(data)
        self.downstream.write(data)

    def from_tunnel_client(self, data: bytes) -> None:
        self.record.received += len(data)
        if self.upstream is not None:
            self.upstream.transport.write(data)

    def on_tunnel_end(self) -> None:
        self._leave_upstream()
        self._finish(close=True)

    # -- the end -----------------------------------------------------------------------------------------------------

    def fail(self, failure: Failure, detail: str = "", *, status: int = 0, exhausted: bool = False) -> None:
        """Answer with what a failure stands for; nothing of a response was sent yet."""
        reply = REPLIES[failure]
        self.record.add_flag(reply.flag)
        if exhausted:
            self.record.add_flag(FLAG_RETRIES_EXHAUSTED)
        body = reply.body
        if detail and failure is Failure.CONNECTION_FAILURE:
            body += b", transport failure reason: " + detail.encode("latin-1", "replace")
        self._reply(status or reply.status, body)

    def _reply(self, status: int, body: bytes, extra: bytes = b"") -> None:
        self._leave_upstream()
        self.record.status = status
        self.record.sent = len(body)
        downstream = self.downstream
        close = not self.head.keep_alive or not self.request_complete
        close = close or downstream.proxy.draining or downstream.leaving
        route = getattr(self, "route", None)
        mutation = route.response_headers if route is not None else None
        bodyless = self.head.method == b"HEAD"
        downstream.write(
            headers.local_reply(status, body, close=close, bodyless=bodyless, extra=extra, mutation=mutation)
        )
        self._finish(close=close)

    def _break(self, failure: Failure) -> None:
        """The response cannot be completed: the client must see that it is cut."""
        self.flush()
        self.record.add_flag(REPLIES[failure].flag)
        self.downstream.abort_after_flush(reset=self._until_close)
        self._finish(close=False)

    def on_downstream_lost(self) -> None:
        """The client is gone."""
        if self.state == State.DONE:
            return
        if self.state != State.TUNNEL:
            self.record.add_flag(REPLIES[Failure.DOWNSTREAM_GONE].flag)
        # The last that the client of a tunnel sent is the other end's, though there is nobody to answer.
        self._leave_upstream(flush=self.state == State.TUNNEL)
        self._finish(close=False)

    def on_bad_body(self, failure: Failure) -> None:
        """The request's body is not what its head promised."""
        if self.state in (State.RESPONDING, State.TUNNEL):
            self._leave_upstream()
            self._break(failure)
        elif self.state != State.DONE:
            self.fail(failure)

    def on_idle(self) -> None:
        """Neither side has moved a byte for the listener's stream idle timeout."""
        if self.state in (State.RESPONDING, State.TUNNEL):
            self._leave_upstream()
            self._break(Failure.IDLE_TIMEOUT)
        else:
            self.fail(Failure.IDLE_TIMEOUT, status=504 if self.request_complete else 0)

    def _cancel_timers(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self.downstream.proxy.waiting.discard(self)
        self._cancel_per_try()

    def _finish(self, *, close: bool) -> None:
        self._go(Event.FINISH)
        self._cancel_timers()
        self._body.clear()
        self.record.close()
        self.downstream.on_stream_done(close=close)
