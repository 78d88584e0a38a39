"""The alarm of kernel maps that fill up: a line of the log when a map passes 80 % and 95 %, and when it is below again.

Owns the levels. How full each map is says the kernel (:meth:`agent.kernel.Kernel.pressure`), what becomes of what has no room
:mod:`bpf.limits`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from agent.kernel import Pressure
from bpf.limits import LIMITS
from common import logs

_log = logs.get(__name__)

#: From these ratios on: levels 1 and 2.
LEVELS = (0.80, 0.95)
#: A level ends that much below where it began, or the log would have a line for each element.
_BELOW = 0.05
#: Seconds between looks.
INTERVAL = 10.0


def level(name: str, pressure: Pressure) -> int:
    """0 to 2; 0 for a map that forgets by itself, whose being full says nothing."""
    limit = LIMITS.get(name)
    if limit is None or limit.forgets:
        return 0
    return sum(pressure.ratio >= at for at in LEVELS)


class Alarm:
    """Tells the log."""

    def __init__(self, look: Callable[[], Mapping[str, Pressure]]) -> None:
        self._look = look
        self._levels: dict[str, int] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                self.check(await asyncio.to_thread(self._look))
            except OSError as error:
                _log.error("maps cannot be looked at", reason=str(error))
            await asyncio.sleep(INTERVAL)

    def check(self, found: Mapping[str, Pressure]) -> None:
        """Tell what has changed since the last call."""
        for name, pressure in found.items():
            before, now = self._levels.get(name, 0), level(name, pressure)
            if now < before and pressure.ratio > LEVELS[before - 1] - _BELOW:
                continue
            self._levels[name] = now
            fields = {"map": name, "entries": pressure.used, "capacity": pressure.size}
            if now > before:
                tell = _log.error if now == len(LEVELS) else _log.warning
                tell(
                    "kernel map fills up", **fields, when_full=LIMITS[name].full, flag=f"--map-size {name}=N"
                )
            elif now < before:
                _log.info("kernel map has room again", **fields)
