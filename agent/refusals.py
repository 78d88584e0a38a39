"""Says in the log what the kernel refused, with names, and not more often than anybody reads.

Owns the rate: the first refusal of a kind is logged at once, further ones of the same kind are counted and told together. It
decides nothing. Time is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from agent.kernel import Event
from common import logs

_log = logs.get(__name__)

#: Seconds between two lines about the same (reason, source, destination, port).
INTERVAL = 10.0
#: Kinds that are remembered; more at one time are only counted together.
_MOST = 1024

_Key = tuple[str, int, int, str, int]


class Refusals:
    """``name`` gives a readable name to an identity's number, ``pod`` to a netns cookie."""

    def __init__(self, name: Callable[[int], str], pod: Callable[[int], str]) -> None:
        self._name = name
        self._pod = pod
        self._kinds: dict[_Key, tuple[float, int]] = {}  # when logged last, how many since
        #: When old kinds were forgotten last: a flood of new ones is not to look for them each time.
        self._forgot = float("-inf")

    def tell(self, events: Iterable[Event], now: float) -> None:
        """Log events; ``now`` in seconds of any clock that never goes back."""
        for event in events:
            key = (event.reason.name, event.source, event.destination, event.server[0], event.server[1])
            last, suppressed = self._kinds.get(key, (now - INTERVAL, 0))
            if now - last < INTERVAL:
                self._kinds[key] = (last, suppressed + 1)
                continue
            if len(self._kinds) >= _MOST and now - self._forgot >= 1.0:
                self._forgot = now
                self._kinds = {k: v for k, v in self._kinds.items() if now - v[0] < INTERVAL}
            if len(self._kinds) >= _MOST:
                continue
            self._kinds[key] = (now, 0)
            fields: dict[str, object] = {
                "source": self._name(event.source),
                "destination": self._name(event.destination),
            }
            if event.netns_cookie:
                fields["pod"] = self._pod(event.netns_cookie)
            if suppressed:
                fields["more_since_last"] = suppressed
            _log.warning(
                "connection refused",
                reason=event.reason.name.lower().replace("_", "-"),
                client=_text(event.client),
                server=_text(event.server),
                **fields,
            )


def _text(end: tuple[str, int]) -> str:
    address, port = end
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
