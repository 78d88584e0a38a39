"""A real Kubernetes on one machine: API server, nodes with namespaces of their own, kubelet, containerd, kube-proxy.

:class:`ControlPlane` is the API server alone, in three seconds.
"""

from lab.kubernetes.control_plane import ControlPlane

__all__ = ["ControlPlane"]
