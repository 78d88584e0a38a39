"""The CNI plugin: chained last, it tells the agent which pod namespaces come and go.

Owns the plugin's side of the CNI specification and ``protocol``, the versioned messages between plugin and agent. Run
once per pod by the container runtime, so imports stay few. It programs nothing itself, and it never blocks a node:
with the agent away it answers as the specification says.
"""
