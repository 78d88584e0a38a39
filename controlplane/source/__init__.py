"""Where configuration comes from: objects, keyed without API version, and what is wrong with those that are not there.

A source hands out whole states and judges nothing but single objects (by a function it is given). Today: a folder of
Kubernetes manifests. Later: the Kubernetes API, behind the same :class:`Source`.
"""

from controlplane.source.objects import Fault, Key, Object, Source, State, Validator

__all__ = ["Fault", "Key", "Object", "Source", "State", "Validator"]
