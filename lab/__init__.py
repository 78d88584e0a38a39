"""The light lab: nodes and pods as network namespaces on one machine.

Owns the fabric, nodes with their own mount namespace, bpffs and cgroup subtree, and pods that are created through the
real CNI chain, as a container runtime does. Used by demo, tests and benchmark; nothing in the product knows that it is
in a lab.
"""

from lab.capture import Capture
from lab.errors import LabError
from lab.lab import Lab
from lab.metrics import Metrics
from lab.node import Node
from lab.place import CommandError, Place
from lab.pod import Pod
from lab.runtime import CniError
from lab.talker import Answer, Talker
from lab.traffic import Traffic

__all__ = [
    "Answer",
    "Capture",
    "CniError",
    "CommandError",
    "Lab",
    "LabError",
    "Metrics",
    "Node",
    "Place",
    "Pod",
    "Talker",
    "Traffic",
]
