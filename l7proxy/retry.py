"""Whether and when a failed attempt is repeated: Envoy's retry policies (router filter, "x-envoy-retry-on").

Owns the decision for one request; sends nothing. Whether a repetition is possible at all (nothing sent downstream, body
still held) is the caller's knowledge.
"""

from __future__ import annotations

import enum
from random import Random

from l7proxy.errors import Failure
from l7proxy.http1.head import ResponseHead
from l7proxy.model import RetryPolicy

#: RFC 9110, section 9.2.2: a proxy may repeat these by itself when a reused connection turned out to be closed.
IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})

_GRPC = {1: "cancelled", 4: "deadline-exceeded", 13: "internal", 8: "resource-exhausted", 14: "unavailable"}
#: An upstream that failed before it answered counts as a 5xx (it will become one).
_ANY_RESET = frozenset({"5xx", "gateway-error", "reset"})


class Decision(enum.Enum):
    NO = "no"
    RETRY = "retry"
    EXHAUSTED = "exhausted"


class RetryState:
    __slots__ = ("_policy", "_random", "attempts", "left")

    def __init__(self, policy: RetryPolicy, random: Random) -> None:
        self._policy = policy
        self._random = random
        self.left = policy.num_retries
        self.attempts = 0

    def on_response(self, head: ResponseHead) -> Decision:
        return self._decide(self._would_retry_response(head))

    def on_failure(self, failure: Failure, *, request_started: bool) -> Decision:
        """``request_started``: bytes of the request went to the upstream in this attempt."""
        return self._decide(self._would_retry_failure(failure, request_started))

    def _decide(self, wanted: bool) -> Decision:
        if not wanted:
            return Decision.NO
        if self.left <= 0:
            return Decision.EXHAUSTED
        self.left -= 1
        self.attempts += 1
        return Decision.RETRY

    def delay(self) -> float:
        """Seconds before the next attempt: uniformly drawn below base * (2^n - 1), at most the longest interval."""
        ceiling = self._policy.base_interval * ((1 << min(self.attempts, 20)) - 1)
        return min(self._random.random() * ceiling, self._policy.max_interval)

    def _would_retry_response(self, head: ResponseHead) -> bool:
        retry_on = self._policy.retry_on
        if b"x-envoy-ratelimited" in head.values:
            return "envoy-ratelimited" in retry_on
        status = head.status
        if status >= 500 and "5xx" in retry_on:
            return True
        if 502 <= status <= 504 and "gateway-error" in retry_on:
            return True
        if status == 409 and "retriable-4xx" in retry_on:
            return True
        if status in self._policy.status_codes and "retriable-status-codes" in retry_on:
            return True
        grpc = head.values.get(b"grpc-status")
        if grpc is not None and grpc.isdigit():
            return _GRPC.get(int(grpc)) in retry_on
        return False

    def _would_retry_failure(self, failure: Failure, request_started: bool) -> bool:
        retry_on = self._policy.retry_on
        if failure is Failure.OVERFLOW:
            return False
        if retry_on & _ANY_RESET:
            return True
        if failure is Failure.CONNECTION_FAILURE and "connect-failure" in retry_on:
            return True
        return "reset-before-request" in retry_on and not request_started
