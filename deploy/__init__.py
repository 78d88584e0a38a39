"""What Mycel is on a Kubernetes cluster: objects, Helm chart, custom resource definitions and images.

The objects have one source, :func:`deploy.manifests.build`; ``mycel install`` writes them, and :mod:`deploy.chart` writes
the Helm chart from the same function. Owns no behaviour: it says what runs with which rights, not what that does.
"""
