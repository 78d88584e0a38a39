"""The mesh's certificate authority: its root, workload certificates (X.509-SVIDs), and the controller's own TLS certificate.

The authority knows no pods and no callers; :mod:`controlplane.ca.service` decides who gets what.
"""
