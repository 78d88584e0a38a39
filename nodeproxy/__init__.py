"""The node proxy: carries enrolled TCP between nodes over HBONE (HTTP/2 CONNECT in mutual TLS 1.3).

Owns the workload keys of its node, in memory only, the connections to other nodes and the verification of their
peers' identities. It never parses what it carries and has no capabilities: sockets come from the agent.
"""
