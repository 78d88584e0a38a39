"""Which of the controllers writes: the holder of a Lease.

As client-go does it: who holds the Lease renews it; another takes it when it has not changed for its duration *as seen here*, so
that clocks need not agree. Every write names the resourceVersion that was read, so of two only one succeeds. A leader that could
not renew in time steps down before anybody may take over; one that ends gives the Lease up.

Owns the Lease only. What a leader does is passed in, and cancelled when it leads no longer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

from common import logs
from common.kubernetes import ApiError, Client, Unreachable, path_of

_log = logs.get(__name__)
LEASE = "mycel-controlplane"


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds, client-go's own: a Lease's duration, how long a leader tries to renew it, how often."""

    duration: float = 15.0
    deadline: float = 10.0
    retry: float = 2.0


class Leader:
    """Runs ``work`` whenever this process leads."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        identity: str,
        work: Callable[[], Awaitable[None]],
        registry: CollectorRegistry,
        times: Times = Times(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``identity``: this process's name, unique among those that may lead (the pod's name)."""
        self._client = client
        self._path = path_of("coordination.k8s.io/v1", "leases", namespace, LEASE)
        self._identity = identity
        self._work = work
        self._times = times
        self._clock = clock
        self._seen: dict[str, Any] = {}  #: the Lease's spec as it was seen last, and since when
        self._seen_at = 0.0
        self._renewed_at = 0.0  #: no later than the last write of ours: others count from when they see that
        self._complained = ""
        self.leading = False
        self._gauge = Gauge(
            "mycel_controlplane_leader", "1 if this controller writes status.", registry=registry
        )

    async def run(self) -> None:
        """Take part until cancelled; then the Lease is given up."""
        try:
            while True:
                if await self._attempt(self._times.deadline):
                    await self._lead()
                await asyncio.sleep(self._times.retry)
        finally:
            if self._holder() == self._identity:
                with suppress(ApiError, Unreachable, TimeoutError):
                    async with asyncio.timeout(2.0):
                        await self._release()

    async def _lead(self) -> None:
        """Work and renew, until the Lease could not be renewed in time or the work fails."""
        self._set(True)
        work = asyncio.ensure_future(self._work())
        try:
            while True:
                await asyncio.wait({work}, timeout=max(min(self._times.retry, self._left()), 0.0))
                if work.done():
                    break
                renewed = self._left() > 0 and await self._attempt(self._left())
                if not renewed and (self._left() <= 0 or self._holder() != self._identity):
                    _log.warning("no longer leader: the lease was not renewed", lease=LEASE)
                    break
        finally:
            self._set(False)
            work.cancel()
            await asyncio.wait({work})
            if not work.cancelled() and (error := work.exception()) is not None:
                _log.exception("the leader's work failed; it is taken up again", error)

    def _left(self) -> float:
        """Seconds that a leader has still to renew the Lease in."""
        return self._renewed_at + self._times.deadline - self._clock()

    def _holder(self) -> str:
        """Who held the Lease when it was seen last."""
        return self._seen.get("holderIdentity") or ""

    async def _attempt(self, patience: float) -> bool:
        """Take or renew the Lease, if it may be taken, within ``patience`` seconds; True if it is ours now."""
        began = self._clock()
        try:
            async with asyncio.timeout(min(patience, self._times.deadline / 2)):
                taken = await self._take()
            if taken:
                self._renewed_at = began
            return taken
        except ApiError as e:
            if e.reason == "Conflict":
                return False  # somebody was faster
            self._complain(e)
        except (Unreachable, TimeoutError) as e:
            self._complain(e)
        return False

    async def _take(self) -> bool:
        lease = await self._client.get(self._path)
        spec: dict[str, Any] = lease.get("spec") or {}
        now = self._clock()
        if spec != self._seen:
            self._seen, self._seen_at = spec, now
        holder = spec.get("holderIdentity") or ""
        if holder not in ("", self._identity):
            duration = float(spec.get("leaseDurationSeconds") or self._times.duration)
            if now < self._seen_at + duration:
                self._complained = ""
                return False
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        ours = holder == self._identity
        lease["spec"] = spec | {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(round(self._times.duration), 1),
            "acquireTime": (spec.get("acquireTime") if ours else None) or stamp,
            "renewTime": stamp,
            "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (0 if ours else 1),
        }
        written = await self._client.replace(self._path, lease, fieldManager="mycel-controlplane")
        self._seen, self._seen_at = written.get("spec") or {}, self._clock()
        self._complained = ""
        return True

    async def _release(self) -> None:
        lease = await self._client.get(self._path)
        spec: dict[str, Any] = lease.get("spec") or {}
        if spec.get("holderIdentity") == self._identity:
            lease["spec"] = spec | {"holderIdentity": "", "leaseDurationSeconds": 1}
            await self._client.replace(self._path, lease, fieldManager="mycel-controlplane")

    def _set(self, leading: bool) -> None:
        self.leading = leading
        self._gauge.set(leading)
        if leading:
            _log.info("leader", identity=self._identity)

    def _complain(self, error: BaseException) -> None:
        text = str(error) or type(error).__name__
        if text != self._complained:
            _log.warning("lease cannot be had", lease=LEASE, error=text)
        self._complained = text
