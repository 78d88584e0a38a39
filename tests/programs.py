"""Which kernel programs are attached where, asked of the kernel."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

#: enum bpf_attach_type (linux/bpf.h).
CGROUP_SOCK_OPS, CGROUP_INET4_CONNECT, SK_LOOKUP = 3, 10, 36


def attached(path: Path, kind: int) -> list[int]:
    """Ids of the programs that are attached to a cgroup or a network namespace."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    ids = (ctypes.c_uint32 * 16)()
    count = ctypes.c_uint32(16)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert libbpf.bpf_prog_query(fd, kind, 0, None, ids, ctypes.byref(count)) == 0, os.strerror(
            ctypes.get_errno()
        )
    finally:
        os.close(fd)
    return list(ids[: count.value])


def loaded(number: int) -> bool:
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    fd = libbpf.bpf_prog_get_fd_by_id(number)
    if fd >= 0:
        os.close(fd)
    return bool(fd >= 0)
