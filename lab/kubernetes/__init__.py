"""A real Kubernetes on one machine: API server, nodes with namespaces of their own, kubelet, containerd, kube-proxy.

:class:`ControlPlane` is the API server alone, in three seconds; :class:`Cluster` has nodes too. By hand:
``python -m lab.kubernetes up --name try``.
"""

from lab.kubernetes.cluster import Cluster
from lab.kubernetes.control_plane import ControlPlane
from lab.kubernetes.node import Node

__all__ = ["Cluster", "ControlPlane", "Node"]
