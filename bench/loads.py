"""What a client does on a path, and the command line that does it."""

from __future__ import annotations

import enum
import json

from bench import wrk

#: Of each answer of :attr:`Load.LARGE`.
LARGE_BYTES = 8 << 20
#: iperf3's.
BULK_PORT = 5201


class Load(enum.Enum):
    """One client, several connections at once."""

    REQUESTS = "requests with keep-alive"
    CONNECTIONS = "a new connection for each request"
    LARGE = "answers of 8 MB with keep-alive"
    BULK = "iperf3, streams from the client"


def command(load: Load, url: str, *, clients: int, seconds: int) -> list[str]:
    """:param url: of the server; only its host counts for :attr:`Load.BULK`."""
    if load is Load.BULK:
        host = url.removeprefix("http://").partition("/")[0].partition(":")[0]
        return [
            "iperf3", "--client", host, "--port", str(BULK_PORT), "--parallel", str(clients), "--time", str(seconds),
            "--json",
        ]  # fmt: skip
    made = wrk.command(url + ("large" if load is Load.LARGE else ""), clients=clients, seconds=seconds)
    return made if load is not Load.CONNECTIONS else [*made[:-1], "--header", "Connection: close", made[-1]]


def parse(load: Load, output: str) -> wrk.Run:
    """:raises wrk.RunError: the run had errors, or the output tells of none."""
    if load is not Load.BULK:
        return wrk.parse(output)
    try:
        measured = json.loads(output)
        bits = measured["end"]["sum_received"]["bits_per_second"]
    except (ValueError, KeyError):
        raise wrk.RunError(f"iperf3 said nothing of its run: {output.strip()[-400:]!r}") from None
    return wrk.Run(0.0, 0, 0, 0, gbit_per_second=bits / 1e9)
