"""The limit of open file descriptors, which a process that holds others' connections has to raise itself.

Owns nothing else. A container's soft limit is often 1,024, for the sake of programs that use select(2); each connection that a
proxy carries is two descriptors, and each of its pods has some in stock.
"""

from __future__ import annotations

import resource


def raise_limit() -> None:
    """Raise this process's limit as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
