"""The workload/policy stream to agents and node proxies: a core without sockets, and its gRPC service."""
