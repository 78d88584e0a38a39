"""Istio's configuration, compiled into the model: one module per kind.

Each keeps to Istio's own rules of precedence; where something is not in force yet, a finding says so, and where that could let
more through than was asked for, it is refused instead.
"""

GROUP_NETWORKING = "networking.istio.io"
GROUP_SECURITY = "security.istio.io"
