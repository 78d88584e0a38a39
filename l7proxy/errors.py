"""The proxy's own exceptions and failures, and the one place that maps them to a status and response flags.

Owns the vocabulary of what can go wrong with a request. Flags are Envoy's (access log, "%RESPONSE_FLAGS%"). Faults of the
downstream peer, of the upstream peer and of the configuration are different kinds.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class L7ProxyError(Exception):
    """Base of every exception that this package raises on purpose."""


class ProtocolError(L7ProxyError):
    """The bytes are no HTTP/1.1 message that this proxy accepts.

    :ivar status: what a server answers to such a request (400, 431, 501, 505).
    """

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


class ConversionError(L7ProxyError):
    """An xDS resource cannot become configuration; the message names field and reason."""


class AgentError(L7ProxyError):
    """The agent refused, is away, or did not answer in time."""


class Failure(enum.Enum):
    """Why a request was not answered by an upstream: each is one (status, flag, body) of :data:`REPLIES`."""

    NO_ROUTE = "no route"
    NO_CLUSTER = "no cluster"
    NO_CONFIGURATION = "no configuration for the destination"
    NO_HEALTHY_UPSTREAM = "no healthy upstream"
    OVERFLOW = "overflow"
    CONNECTION_FAILURE = "connection failure"
    CONNECTION_TERMINATION = "connection termination"
    UPSTREAM_PROTOCOL = "protocol error"
    TIMEOUT = "timeout"
    PER_TRY_TIMEOUT = "per try timeout"
    BAD_REQUEST = "bad request"
    HEADERS_TOO_LARGE = "headers too large"
    NOT_IMPLEMENTED = "not implemented"
    VERSION = "version not supported"
    UPGRADE_REFUSED = "upgrade refused"
    IDLE_TIMEOUT = "stream idle timeout"
    DOWNSTREAM_GONE = "downstream connection termination"
    DRAINING = "shutting down"


@dataclass(frozen=True, slots=True)
class Reply:
    """``status`` 0: nobody is there to answer."""

    status: int
    flag: str
    body: bytes


_RESET = b"upstream connect error or disconnect/reset before headers. reset reason: "

#: Envoy's answers and flags for the same failures (its router and connection manager).
REPLIES: dict[Failure, Reply] = {
    Failure.NO_ROUTE: Reply(404, "NR", b""),
    Failure.NO_CLUSTER: Reply(503, "NC", b""),
    Failure.NO_CONFIGURATION: Reply(503, "NC", b"no configuration for this destination"),
    Failure.NO_HEALTHY_UPSTREAM: Reply(503, "UH", b"no healthy upstream"),
    Failure.OVERFLOW: Reply(503, "UO", _RESET + b"overflow"),
    Failure.CONNECTION_FAILURE: Reply(503, "UF", _RESET + b"connection failure"),
    Failure.CONNECTION_TERMINATION: Reply(503, "UC", _RESET + b"connection termination"),
    Failure.UPSTREAM_PROTOCOL: Reply(502, "UPE", _RESET + b"protocol error"),
    Failure.TIMEOUT: Reply(504, "UT", b"upstream request timeout"),
    Failure.PER_TRY_TIMEOUT: Reply(504, "UT", b"upstream request timeout"),
    Failure.BAD_REQUEST: Reply(400, "DPE", b"Bad Request"),
    Failure.HEADERS_TOO_LARGE: Reply(431, "DPE", b"Request Header Fields Too Large"),
    Failure.NOT_IMPLEMENTED: Reply(501, "DPE", b"Not Implemented"),
    Failure.VERSION: Reply(505, "DPE", b"HTTP Version Not Supported"),
    Failure.UPGRADE_REFUSED: Reply(403, "-", b""),
    Failure.IDLE_TIMEOUT: Reply(408, "SI", b"stream timeout"),
    Failure.DOWNSTREAM_GONE: Reply(0, "DC", b""),
    Failure.DRAINING: Reply(503, "-", b"shutting down"),
}

#: Appended to the flag when the retries that a policy allows are used up.
FLAG_RETRIES_EXHAUSTED = "URX"

_BY_STATUS = {
    400: Failure.BAD_REQUEST,
    431: Failure.HEADERS_TOO_LARGE,
    501: Failure.NOT_IMPLEMENTED,
    505: Failure.VERSION,
}


def failure_of(error: ProtocolError) -> Failure:
    """The failure that a downstream message's defect is."""
    return _BY_STATUS.get(error.status, Failure.BAD_REQUEST)
