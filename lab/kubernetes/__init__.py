"""A real Kubernetes on one machine: API server, nodes with namespaces of their own, kubelet, containerd, kube-proxy.

:class:`ControlPlane` is the API server alone, in three seconds; :class:`Cluster` has nodes too, and
:class:`Kubernetes` is a cluster that somebody else made. By hand:
``python -m lab.kubernetes up --name try``.
"""

from lab.kubernetes.access import Kubernetes
from lab.kubernetes.cluster import Cluster
from lab.kubernetes.control_plane import ControlPlane
from lab.kubernetes.node import Node

__all__ = ["Cluster", "ControlPlane", "Kubernetes", "Node"]
