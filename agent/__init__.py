"""The node agent: what one node's kernel enforces and who lives on that node.

Owns the pinned eBPF programs and maps, the enrolment of pods (it serves the CNI plugin), the sockets made inside pods'
network namespaces, the compiled L4 policy and the accounting. It never parses HTTP and never holds a private key, and
its absence never disturbs established traffic.
"""
