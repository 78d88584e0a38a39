"""The one model that every dialect compiles into, and the compiler's frame.

Pure: objects in, one immutable :class:`~controlplane.model.snapshot.Snapshot` out. No sockets, clocks, files.
"""
