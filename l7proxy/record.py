"""What is known of one request, for access log and metrics: filled while it lives, closed exactly once.

Owns no formatting and no counting; both read the closed record.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter, time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from l7proxy.http1.head import RequestHead
    from l7proxy.model import Cluster
    from l7proxy.pods import Pod
    from l7proxy.pool import HostPool


class Record:
    """Times are seconds: ``started_at`` on the wall clock, the others on the monotonic one; sizes are bytes of bodies."""

    __slots__ = (
        "_sink", "closed", "cluster", "duration", "flags", "head", "host", "path", "pod", "received", "request_id",
        "sent", "service_time", "started", "started_at", "status",
    )  # fmt: skip

    def __init__(self, sink: Callable[[Record], None], pod: Pod, head: RequestHead | None) -> None:
        self._sink = sink
        self.pod = pod
        self.head = head
        self.started_at = time()
        self.started = perf_counter()
        self.status = 0
        self.flags = "-"
        self.received = 0
        self.sent = 0
        self.duration = 0.0
        self.service_time = -1  #: milliseconds until the upstream's head; -1: there was none
        self.cluster: Cluster | None = None
        self.host: HostPool | None = None
        self.request_id = b"-"
        self.path = "" if head is None else head.path
        self.closed = False

    def add_flag(self, flag: str) -> None:
        if flag == "-" or flag in self.flags.split(","):
            return
        self.flags = flag if self.flags == "-" else f"{self.flags},{flag}"

    def close(self) -> None:
        """Hand the record to access log and metrics.

        :raises RuntimeError: a second time.
        """
        if self.closed:
            raise RuntimeError("record closed twice")
        self.closed = True
        self.duration = perf_counter() - self.started
        self._sink(self)
