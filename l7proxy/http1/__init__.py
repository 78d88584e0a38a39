"""HTTP/1.1 without sockets and clocks: bytes in, events out (RFC 9110, RFC 9112).

Owns the grammar, the framing rules and the readers; knows nothing of routes, connections or configuration.
"""
