"""What every gRPC channel to the controller has in common: when a peer that says nothing is given up.

Owns the options alone. A controller whose machine has lost its power ends no connection: whoever is connected to it would
hold on to the last configuration, while everybody else goes on. A ping is a few bytes and answered by gRPC's own threads, also
while Python is busy.
"""

from __future__ import annotations

#: Seconds without a word until a client asks, and that an answer may take: together the longest that a dead peer is believed.
PING, PONG = 2, 3
#: Seconds for one attempt to connect: an address may be that of a machine which is gone.
CONNECT = 3

CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", PING * 1000),
    ("grpc.keepalive_timeout_ms", PONG * 1000),
    # Without it a ping may take a minute, whatever the line above says.
    ("grpc.http2.ping_timeout_ms", PONG * 1000),
    ("grpc.http2.max_pings_without_data", 0),
    # The name is gRPC's; it is the least that an attempt lasts.
    ("grpc.min_reconnect_backoff_ms", CONNECT * 1000),
    ("grpc.enable_http_proxy", 0),
)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Who pings more often than twice as often as it should is cut off.
    ("grpc.http2.min_ping_interval_without_data_ms", PING * 500),
)
