"""The light lab: nodes and pods as network namespaces on one machine.

Owns the fabric, nodes with their own mount namespace, bpffs and cgroup subtree, and pods that are created through the
real CNI chain, as a container runtime does. Used by demo, tests and benchmark; nothing in the product knows that it is
in a lab.
"""
