"""Checks of single objects against the schema of their kind.

Owns the structural schemas and their rules. What needs other objects to be judged (a subset that no DestinationRule
defines) is the compiler's finding, not this package's error.
"""

from controlplane.schema.validation import known, validate, versions

__all__ = ["known", "validate", "versions"]
