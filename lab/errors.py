"""What the lab raises: one type, with what was tried and what came of it."""

from __future__ import annotations


class LabError(Exception):
    """Something of the lab could not be made, or did not come about in time."""
