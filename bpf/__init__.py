"""The kernel half: C programs for bcc, their one contract with user space, and their loader.

Owns the C sources, ``wire`` (the Python mirror of ``wire.h``, compared with it by a test) and ``loader``, the
only module that imports bcc and only ever in a short-lived process. It decides nothing: verdicts come from maps
that the agent fills.
"""
