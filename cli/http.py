"""Reading what the mesh's processes serve, with errors that say who did not answer and what to look at."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from typing import Any, Protocol

_TIMEOUT = 5.0  # seconds
_LONGEST_REASON = 500  # bytes


class Unreachable(Exception):
    """A process did not answer, or answered with something else than what it serves. The text is for people."""


class Refused(Unreachable):
    """A process answers with an error; ``said`` is its own text, all of it but the end of a very long one."""

    def __init__(self, message: str, status: int, said: str) -> None:
        super().__init__(message)
        self.status = status
        self.said = said


class Reader(Protocol):
    """How admin servers are reached: directly, or through the API server (:class:`cli.cluster.Cluster`)."""

    def read_text(self, address: str, path: str, *, who: str) -> str: ...

    def read_json(self, address: str, path: str, *, who: str) -> Any: ...


class Direct:
    """Admin servers at the addresses that they have."""

    def read_text(self, address: str, path: str, *, who: str) -> str:
        return read_text(address, path, who=who)

    def read_json(self, address: str, path: str, *, who: str) -> Any:
        return decode(self.read_text(address, path, who=who), address, path, who=who)


def read_text(address: str, path: str, *, who: str) -> str:
    """What ``http://ADDRESS/PATH`` serves.

    :param address: ``HOST:PORT``.
    :param who: the process that should be there, for the error's text (``"the controller"``).
    :raises Unreachable: refused, timed out, no HTTP, or a status other than 200.
    """
    url = f"http://{address}{path}"
    try:
        # No proxy of the environment is asked: these are addresses of the cluster.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=_TIMEOUT) as response:
            body: bytes = response.read()
            return body.decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        # What is not ready says why in its answer.
        said = ""
        with contextlib.suppress(OSError, http.client.HTTPException):
            said = error.read(_LONGEST_REASON).decode("utf-8", "replace").strip().partition("\n")[0]
        status = f"{error.code} {error.reason}" + (f": {said}" if said else "")
        raise Refused(f"{who} at {address} answers {path} with {status}", error.code, said) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise Unreachable(f"{who} does not answer at {address}: {reason}") from error


def decode(body: str, address: str, path: str, *, who: str) -> Any:
    """:raises Unreachable: what was answered is no JSON."""
    try:
        return json.loads(body)
    except ValueError as error:
        raise Unreachable(
            f"{who} at {address} answers {path} with something that is no JSON: {body[:60]!r}"
        ) from error
