"""Which objects get a verdict, and who gives it."""

from __future__ import annotations

from controlplane.compiler import is_compiled, is_policy

__all__ = ["CONTROLLER", "is_compiled", "is_policy"]

#: Our name in Gateway API objects (``controllerName``), and as who reports Events.
CONTROLLER = "mycel.io/controller"
