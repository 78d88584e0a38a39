"""The controller: configuration and workloads in, one immutable snapshot out.

Owns the sources of objects, validation, the compiled snapshot, xDS for L7 proxies, the workload and policy stream for
agents, and the certificate authority. It never touches traffic, and one bad object never stops the rest.
"""
