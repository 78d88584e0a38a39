"""Is an object of a kind that is known, and are its fields as the kind's schema says?

Owns the structural schemas and their rules. Knows single objects only: what needs other objects to be judged (a subset that
no DestinationRule defines) is the compiler's finding, not this package's error.
"""

from controlplane.schema.validation import known, validate

__all__ = ["known", "validate"]
