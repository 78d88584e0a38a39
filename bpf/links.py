"""Programs and links at run time, through ``libbpf.so.1`` by ctypes: load, attach, replace, pin.

Owns the calls; which program belongs where is the loader's (cgroups, iterators) and the agent's (namespaces of pods).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from pathlib import Path
from typing import NamedTuple

# enum bpf_attach_type
CGROUP_SOCK_OPS = 3
CGROUP_INET_SOCK_CREATE = 2
SK_MSG_VERDICT = 7
CGROUP_INET4_CONNECT = 10
CGROUP_INET6_CONNECT = 11
CGROUP_UDP4_SENDMSG = 14
CGROUP_UDP6_SENDMSG = 15
CGROUP_UDP4_RECVMSG = 19
CGROUP_UDP6_RECVMSG = 20
TRACE_RAW_TP = 23
TRACE_FENTRY = 24
TRACE_ITER = 28
CGROUP_INET4_GETPEERNAME = 29
CGROUP_INET6_GETPEERNAME = 30
SK_LOOKUP = 36
TCX_INGRESS = 46
TCX_EGRESS = 47

# enum bpf_link_type
TYPE_CGROUP = 3

# enum bpf_prog_type
PROG_SCHED_CLS = 3
PROG_CGROUP_SOCK = 9
PROG_SOCK_OPS = 13
PROG_SK_MSG = 16
PROG_CGROUP_SOCK_ADDR = 18
PROG_TRACING = 26
PROG_SK_LOOKUP = 30

# struct bpf_prog_info.btf_id
_PROGRAM_INFO_BTF_ID = 128

_PROG_QUERY = 16
_LINK_CREATE = 28
#: BPF_F_BEFORE without a relative: at the head
_BEFORE = 8
_SYS_BPF = {"x86_64": 321, "aarch64": 280}

_libc = ctypes.CDLL(None, use_errno=True)
_lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
_lib.bpf_obj_get.argtypes = (ctypes.c_char_p,)
_lib.bpf_obj_pin.argtypes = (ctypes.c_int, ctypes.c_char_p)
_lib.bpf_link_create.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_lib.bpf_link_update.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_lib.bpf_obj_get_info_by_fd.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32))
_lib.bpf_prog_load.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
)
_lib.libbpf_find_vmlinux_btf_id.argtypes = (ctypes.c_char_p, ctypes.c_int)


class LinkError(OSError):
    """Attaching, replacing or pinning failed; ``errno`` is the kernel's."""


class LinkInfo(NamedTuple):
    """``where`` is the cgroup's id or the namespace's inode; 0 when it is gone."""

    type: int
    id: int
    program: int
    where: int


class _LinkCreateOptions(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("flags", ctypes.c_uint32),
        ("iter_info", ctypes.c_void_p),
        ("iter_info_len", ctypes.c_uint32),
        ("target_btf_id", ctypes.c_uint32),
    )


class _ProgLoadOptions(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_int),
        ("prog_btf_fd", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_ifindex", ctypes.c_uint32),
        ("kern_version", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
        ("attach_prog_fd", ctypes.c_uint32),
        ("attach_btf_obj_fd", ctypes.c_uint32),
        ("fd_array", ctypes.c_void_p),
        ("func_info", ctypes.c_void_p),
        ("func_info_cnt", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("line_info", ctypes.c_void_p),
        ("line_info_cnt", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_char_p),
    )


def _check(status: int, what: str) -> int:
    if status < 0:
        code = ctypes.get_errno() or -status
        raise LinkError(code, f"{what}: {os.strerror(code)}")
    return int(status)


def open_pin(path: str) -> int:
    """A descriptor of what is pinned there.

    :raises LinkError: nothing is.
    """
    return _check(_lib.bpf_obj_get(path.encode()), f"open {path}")


def pin(fd: int, path: str) -> None:
    """Pin, in place of what is there, at once for whoever opens it.

    :raises LinkError: it is no bpf file system.
    """
    new = unfinished(path)
    if os.path.exists(new):
        os.unlink(new)
    _check(_lib.bpf_obj_pin(fd, new.encode()), f"pin {path}")
    os.rename(new, path)


def unfinished(path: str) -> str:
    """Where a process that ends in the midst of :func:`pin` leaves what it pins."""
    # A bpf file system takes no dots.
    return os.path.join(os.path.dirname(path), f"new_{os.path.basename(path)}")


def attach(program: int, target: int, attach_type: int) -> int:
    """Attach a program to a cgroup or network namespace; the descriptor of the link."""
    return _check(_lib.bpf_link_create(program, target, attach_type, None), f"attach (type {attach_type})")


def attach_tcx(program: int, interface: int, attach_type: int) -> int:
    """Attach a program to an interface of the calling thread's namespace, before all others; the descriptor of the link.

    :raises LinkError: EINVAL where the kernel has no tcx (before 6.6).
    """
    # union bpf_attr of BPF_LINK_CREATE: program, interface, attach_type, flags, tcx (relative, expected revision).
    attributes = struct.pack("=IIIIIxxxxQ", program, interface, attach_type, _BEFORE, 0, 0)
    buffer = ctypes.create_string_buffer(attributes, 64)
    number = _libc.syscall(_SYS_BPF[os.uname().machine], _LINK_CREATE, buffer, 64)
    return _check(number, f"attach to interface {interface} (type {attach_type})")


def has_tcx(interface: int, attach_type: int) -> bool:
    """Whether anybody's programs are attached so to an interface of the calling thread's namespace.

    :raises LinkError: there is no such interface.
    """
    # union bpf_attr of BPF_PROG_QUERY: interface, attach_type, two flags, where to write identifiers, how many there are.
    buffer = ctypes.create_string_buffer(struct.pack("=IIIIQI", interface, attach_type, 0, 0, 0, 0), 64)
    if _libc.syscall(_SYS_BPF[os.uname().machine], _PROG_QUERY, buffer, 64) < 0:
        code = ctypes.get_errno()
        # There never was any, or the kernel has no tcx.
        if code not in (errno.ENOENT, errno.EINVAL):
            raise LinkError(
                code, f"programs of interface {interface} (type {attach_type}): {os.strerror(code)}"
            )
        return False
    return bool(struct.unpack_from("=I", buffer, 24)[0])


def attach_iterator(program: int, map_fd: int | None) -> int:
    """A link of an iterator over a map's elements; None for one that is over something else."""
    options = _LinkCreateOptions(sz=ctypes.sizeof(_LinkCreateOptions))
    if map_fd is not None:
        info = ctypes.create_string_buffer(struct.pack("=I12x", map_fd))
        options.iter_info, options.iter_info_len = ctypes.addressof(info), 16
    return _check(_lib.bpf_link_create(program, 0, TRACE_ITER, ctypes.byref(options)), "attach iterator")


def run_iterator(program: int, map_fd: int) -> None:
    """Run an iterator once over all elements of a map."""
    link = attach_iterator(program, map_fd)
    try:
        run = _check(_lib.bpf_iter_create(link), "run iterator")
        try:
            while os.read(run, 65536):
                pass
        finally:
            os.close(run)
    finally:
        os.close(link)


def replace(link: int, program: int) -> None:
    """Let the link run another program from now on, with no moment in between."""
    _check(_lib.bpf_link_update(link, program, None), "replace program")


def detach(link: int) -> None:
    """End what the link attaches, at once, whoever else holds it.

    :raises LinkError: its place is gone.
    """
    _check(_lib.bpf_link_detach(link), "detach")


def link_info(link: int) -> LinkInfo:
    buffer = ctypes.create_string_buffer(64)
    length = ctypes.c_uint32(64)
    _check(_lib.bpf_obj_get_info_by_fd(link, buffer, ctypes.byref(length)), "link info")
    kind, number, program = struct.unpack_from("=III", buffer)
    # The union begins at 16: a cgroup's id has 64 bits, a namespace's inode 32.
    where = struct.unpack_from("=Q" if kind == 3 else "=I", buffer, 16)[0]
    return LinkInfo(kind, number, program, where)


def info_of_pin(path: Path) -> LinkInfo:
    """:raises LinkError: no link is pinned there."""
    link = open_pin(str(path))
    try:
        return link_info(link)
    finally:
        os.close(link)


def program_id(program: int) -> int:
    buffer = ctypes.create_string_buffer(256)
    length = ctypes.c_uint32(256)
    _check(_lib.bpf_obj_get_info_by_fd(program, buffer, ctypes.byref(length)), "program info")
    return int(struct.unpack_from("=II", buffer)[1])


def program_btf_id(number: int) -> int:
    """The number of the types that the program of that number was loaded with; 0 for none."""
    program = _check(_lib.bpf_prog_get_fd_by_id(number), f"program {number}")
    try:
        buffer = ctypes.create_string_buffer(256)
        length = ctypes.c_uint32(256)
        _check(_lib.bpf_obj_get_info_by_fd(program, buffer, ctypes.byref(length)), "program info")
        return int(struct.unpack_from("=I", buffer, _PROGRAM_INFO_BTF_ID)[0])
    finally:
        os.close(program)


def attach_tracepoint(program: int) -> int:
    """A link of a program that :func:`load_tracing` loaded for a tracepoint."""
    return _check(_lib.bpf_raw_tracepoint_open(None, program), "attach tracepoint")


def attach_to_map(program: int, map_fd: int, attach_type: int) -> None:
    """Attach a program to a map of sockets, in place of the one before; those that are in it already keep theirs.

    It stays attached as long as the map lives (links of such maps are newer than the oldest kernel that we run on).
    """
    _check(_lib.bpf_prog_attach(program, map_fd, attach_type, 0), "attach to map")


def has_target(target: str, attach_type: int) -> bool:
    """Whether this kernel has an iterator (TRACE_ITER) or tracepoint (TRACE_RAW_TP) of that name."""
    return int(_lib.libbpf_find_vmlinux_btf_id(target.encode(), attach_type)) > 0


def load_tracing(name: str, target: str, attach_type: int, code: bytes) -> int:
    """Load compiled instructions for the iterator or tracepoint ``target``.

    :param attach_type: TRACE_ITER (bcc knows one program for each target only) or TRACE_RAW_TP (typed arguments).
    :raises LinkError: the verifier refuses it; the message has its log.
    """
    attach_btf_id = _check(
        _lib.libbpf_find_vmlinux_btf_id(target.encode(), attach_type), f"{target} in the kernel's BTF"
    )
    return load(name, PROG_TRACING, attach_type, code, attach_btf_id=attach_btf_id)


def load(name: str, program_type: int, attach_type: int, code: bytes, *, attach_btf_id: int = 0) -> int:
    """Load compiled instructions.

    :raises LinkError: the verifier refuses them; the message has its log.
    """
    log = ctypes.create_string_buffer(1 << 20)
    for log_level in (0, 1):
        options = _ProgLoadOptions(
            sz=ctypes.sizeof(_ProgLoadOptions),
            expected_attach_type=attach_type,
            attach_btf_id=attach_btf_id,
            log_level=log_level,
            log_size=len(log) if log_level else 0,
            log_buf=ctypes.cast(log, ctypes.c_char_p) if log_level else None,
        )
        fd = _lib.bpf_prog_load(
            program_type, name.encode()[:15], b"GPL", code, len(code) // 8, ctypes.byref(options)
        )
        if fd >= 0:
            return int(fd)
    code_of = ctypes.get_errno()
    raise LinkError(code_of, f"load {name}: {os.strerror(code_of)}\n{log.value.decode(errors='replace')}")
