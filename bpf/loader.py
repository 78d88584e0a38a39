"""Compiles the kernel programs, loads and pins them, and attaches them to a cgroup: ``python -m bpf.loader``.

Short-lived, because bcc maps LLVM; the only module that imports bcc. Run again (an upgrade, a restart of the agent) it keeps
every map with all its elements and replaces each program in its link, under traffic and with no moment without one; so it does
with what another version has in force (:mod:`bpf.succession`). Nothing is attached before everything is compiled and accepted by
the verifier. If the programs in force are the very ones that it would bring (:mod:`bpf.seal`), it compiles nothing and is done at
once.

Under ``PINS/v<ABI>/``: maps by their names, ``link_*`` of the cgroup, ``program_sk_lookup`` for the agent to attach in pods'
namespaces, ``netns/COOKIE`` its links there, ``accounts``, ``connections``, ``refused_now`` and ``silent`` (iterators).
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import struct
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from bpf import compiled, links, maps, resize, schema, seal, succession, wire
from bpf.btf import Btf, BtfError

_HERE = Path(__file__).parent
_SOURCES = (
    "connect.c",
    "datagrams.c",
    "create.c",
    "sockops.c",
    "lookup.c",
    "veth.c",
    "iterators.c",
    "splice.c",
    "types.c",
)
_BPFFS_MAGIC = 0xCAFE4A11

#: What one pod may have of a map that all write into: a part of it. More open connections to one listener of ours than that of
#: ``captured`` a pod has no ports for.
_SHARES = {"connecting": 16, "captured": 8}
_LEAST_SHARE = 16


class _Attachment(NamedTuple):
    function: str
    program_type: int
    attach_type: int
    link: str


# In this order: who connects is written down before anything relies on it.
_CGROUP = (
    _Attachment("sock_ops", links.PROG_SOCK_OPS, links.CGROUP_SOCK_OPS, "link_sock_ops"),
    _Attachment(
        "getpeername4", links.PROG_CGROUP_SOCK_ADDR, links.CGROUP_INET4_GETPEERNAME, "link_getpeername4"
    ),
    _Attachment(
        "getpeername6", links.PROG_CGROUP_SOCK_ADDR, links.CGROUP_INET6_GETPEERNAME, "link_getpeername6"
    ),
    # Whose an answer is, before anything is sent elsewhere than to where the application says.
    _Attachment("recvmsg4", links.PROG_CGROUP_SOCK_ADDR, links.CGROUP_UDP4_RECVMSG, "link_recvmsg4"),
    _Attachment("recvmsg6", links.PROG_CGROUP_SOCK_ADDR, links.CGROUP_UDP6_RECVMSG, "link_recvmsg6"),
    _Attachment("sendmsg4", links.PROG_CGROUP_SOCK_ADDR, links.CGROUP_UDP4_SENDMSG, "link_sendmsg4"),
    _Attachment("sendmsg6", links.PROG_CGROUP_SOCK_ADDR, links.CGROUP_UDP6_SENDMSG, "link_sendmsg6"),
    _Attachment("connect4", links.PROG_CGROUP_SOCK_ADDR, links.CGROUP_INET4_CONNECT, "link_connect4"),
    _Attachment("connect6", links.PROG_CGROUP_SOCK_ADDR, links.CGROUP_INET6_CONNECT, "link_connect6"),
    _Attachment("sock_create", links.PROG_CGROUP_SOCK, links.CGROUP_INET_SOCK_CREATE, "link_sock_create"),
)


class _Iterator(NamedTuple):
    function: str
    target: str
    table: str | None  #: None: the target says itself over what
    pin: str


_OF_SOCKETS = ("bpf_sk_storage_map", "sockets")
_ITERATORS = (
    _Iterator("bpf_iter__bpf_sk_storage_map__accounts", *_OF_SOCKETS, "accounts"),
    _Iterator("bpf_iter__bpf_sk_storage_map__connections", *_OF_SOCKETS, "connections"),
    _Iterator("bpf_iter__bpf_sk_storage_map__refused", *_OF_SOCKETS, "refused_now"),
    _Iterator("bpf_iter__bpf_map_elem__silent", "bpf_map_elem", "conversations", "silent"),
    _Iterator("bpf_iter__bpf_sk_storage_map__splice", "bpf_sk_storage_map", "splice_ends", "splice"),
    _Iterator("bpf_iter__tcp__nudge", "tcp", None, "nudge"),
)
_RECV_TRACEPOINT = "sock_recv_length"
_RECV_LINK = "tracepoint_sock_recv_length"
#: Counts what waits in the splice for FIONREAD. Applications that read by edges (nginx) go by that, and would wait for ever.
_FIONREAD = "tcp_bpf_ioctl"


class _Places(NamedTuple):
    """A program for places that come and go with pods: pinned for the agent to attach, its links in a folder."""

    function: str
    program_type: int
    attach_type: int
    pin: str
    links: str  #: pattern


_OF_PODS = (
    _Places("sk_lookup", links.PROG_SK_LOOKUP, links.SK_LOOKUP, "program_sk_lookup", "netns/*"),
    # Without an attach type, so that kernels before tcx load them too (attached as a filter there).
    _Places("from_pod", links.PROG_SCHED_CLS, 0, "program_from_pod", "veth/*_from"),
    _Places("to_pod", links.PROG_SCHED_CLS, 0, "program_to_pod", "veth/*_to"),
)


class LoadError(Exception):
    """Why the programs are not in force; what was in force before still is."""


def kernel_headers() -> Path:
    """The tree that bcc compiles with: BCC_KERNEL_SOURCE, else what ``scripts/setup`` put into the cache.

    :raises LoadError: there is none.
    """
    if given := os.environ.get("BCC_KERNEL_SOURCE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("MYCEL_CACHE") or Path(base, "mycel"))
    tree = cache / "headers/current"
    if not tree.exists():
        raise LoadError(f"no kernel headers: neither BCC_KERNEL_SOURCE nor {tree}")
    return tree


def kernel_macros(btf: Btf) -> dict[str, int]:
    """What the programs need to know of this kernel's structures.

    :raises BtfError: this kernel's are not as they have to be.
    """
    return {
        "TCP_SOCK_BYTES_ACKED": btf.offset("tcp_sock", "bytes_acked"),
        "TCP_SOCK_BYTES_RECEIVED": btf.offset("tcp_sock", "bytes_received"),
        "TCP_SOCK_WRITE_SEQ": btf.offset("tcp_sock", "write_seq"),
        "TCP_SOCK_SND_UNA": btf.offset("tcp_sock", "snd_una"),
        "TCP_SOCK_RCV_NXT": btf.offset("tcp_sock", "rcv_nxt"),
        "TCP_SOCK_COPIED_SEQ": btf.offset("tcp_sock", "copied_seq"),
        "TCP_SOCK_URG_DATA": btf.offset("tcp_sock", "urg_data"),
        "TCP_SOCK_URG_SEQ": btf.offset("tcp_sock", "urg_seq"),
        "TCP_SOCK_SRTT_US": btf.offset("tcp_sock", "srtt_us"),
        "TCP_SOCK_TOTAL_RETRANS": btf.offset("tcp_sock", "total_retrans"),
        # A socket's address is that of its tcp_sock, so these count from there too.
        "SOCK_FLAGS": btf.offset("sock_common", "skc_flags"),
        "SOCK_STATE": btf.offset("sock_common", "skc_state"),
        "SOCK_DONE": btf.enumerator("sock_flags", "SOCK_DONE"),
        "SOCK_ZEROCOPY": btf.enumerator("sock_flags", "SOCK_ZEROCOPY"),
        "SOCK_URGINLINE": btf.enumerator("sock_flags", "SOCK_URGINLINE"),
        "SOCK_SHUTDOWN": btf.offset("sock", "sk_shutdown"),
        "SOCK_RCVLOWAT": btf.offset("sock", "sk_rcvlowat"),
        "SOCK_SOCKET": btf.offset("sock", "sk_socket"),
        "SOCK_ULP": btf.offset("inet_connection_sock", "icsk_ulp_ops"),
        "SOCKET_FILE": btf.offset("socket", "file"),
        "FILE_FLAGS": btf.offset("file", "f_flags"),
        "TCP_SOCK_DATA_SEGS_OUT": btf.offset("tcp_sock", "data_segs_out"),
        "TCP_SOCK_FASTOPEN_RSK": btf.offset("tcp_sock", "fastopen_rsk"),
    }


def load(pins: Path, cgroup: Path, sizes: dict[str, int], *, replace: bool = False) -> dict[str, object]:
    """Bring everything into force; gives what was done, for the log.

    :param sizes: elements by map, for maps that have to be made.
    :param replace: compile and replace the programs also if those in force are the same.
    :raises LoadError: nothing was changed that matters (maps may have been made).
    """
    _require_bpffs(pins)
    folder = pins / f"v{wire.ABI}"
    with ExitStack() as stack:
        lock = os.open(pins, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise LoadError(f"cgroup {cgroup}: {error.strerror}") from None
        stack.callback(os.close, target)
        try:
            others = succession.others(pins, folder)
            before = succession.predecessor(folder, others)
            for name in ("netns", "veth"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            opened, made, resized = _open_maps(folder, before, sizes, stack)
            with Btf.of_kernel() as btf:
                macros = kernel_macros(btf)
            sealed = seal.digest(
                [*_HERE.rglob("*.[ch]"), Path(__file__)],
                macros,
                [(name, one.info.id) for name, one in sorted(opened.items())],
            )
            _drop_links_of_the_gone(folder)
            pinned = {a.link: os.fstat(target).st_ino for a in _CGROUP} | {i.pin: 0 for i in _ITERATORS}
            of_pods = [(places.pin, places.links) for places in _OF_PODS]
            if not replace and not others and not resized and seal.holds(folder, sealed, pinned, of_pods):
                return {
                    "maps_made": [],
                    "maps_resized": {},
                    "versions_replaced": [],
                    "programs_replaced": [],
                    "namespaces": 0,
                }
            programs, iterators, carriers = _compile(opened, macros, resized, stack)
            patterns = [attachment.link for attachment in _CGROUP] + [places.links for places in _OF_PODS]
            succession.take_links(folder, others, [*patterns, _RECV_LINK])
            replaced = []
            for number, attachment in enumerate(_CGROUP):
                if _attach(folder, attachment, programs[attachment.function], target):
                    replaced.append(attachment)
                if number == 0:
                    resize.when_both_are_written(resized, carriers)
            namespaces, *_ = [
                _attach_of_pods(folder, places, programs[places.function]) for places in _OF_PODS
            ]
            for iterator in _ITERATORS:
                table = opened[iterator.table].fd if iterator.table else None
                _attach_iterator(folder / iterator.pin, iterators[iterator.pin], table)
            _attach_splice(folder, programs, opened)
            resize.finish(resized, carriers)
            for name, one in resized.items():
                links.pin(one.now.fd, str(folder / name))
            if resized:
                # These programs write into both; the next load brings ones that do not.
                seal.remove(folder)
            else:
                seal.put(folder, sealed, pinned, of_pods)
            for other in others:
                succession.remove(other)
        except (
            *(maps.MapError, links.LinkError, BtfError),
            *(succession.SuccessionError, resize.ResizeError),
        ) as error:
            raise LoadError(str(error)) from None
    return {
        "maps_made": made,
        "maps_resized": {name: one.now.info.max_entries for name, one in resized.items()},
        "versions_replaced": [other.name for other in others],
        "programs_replaced": [attachment.function for attachment in replaced],
        "namespaces": namespaces,
    }


def _require_bpffs(pins: Path) -> None:
    pins.mkdir(parents=True, exist_ok=True)
    # struct statfs begins with f_type, a long.
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(str(pins).encode(), buffer) != 0:
        raise LoadError(f"pins {pins}: {os.strerror(ctypes.get_errno())}")
    if struct.unpack_from("=l", buffer)[0] & 0xFFFFFFFF != _BPFFS_MAGIC:
        raise LoadError(f"pins {pins}: not on a bpf file system (mount -t bpf bpf /sys/fs/bpf)")


def _open_maps(
    folder: Path, before: Path | None, sizes: dict[str, int], stack: ExitStack
) -> tuple[dict[str, maps.Map], list[str], dict[str, resize.Resized]]:
    """The maps by name, which were made, and which get another size; ``before`` are the pins of the version to take over."""
    opened: dict[str, maps.Map] = {}
    made: list[str] = []
    resized: dict[str, resize.Resized] = {}
    for spec in schema.MAPS:
        path = folder / spec.name
        size = sizes.get(spec.name, spec.max_entries)
        if path.exists():
            one = maps.Map.open(str(path))
            stack.callback(one.close)
            found = (one.info.type, one.key_size, one.value_size)
            if found != (spec.type, spec.key_size, spec.value_size):
                raise LoadError(f"map {path}: (type, key, value) is {found}, not {spec[1:4]}, within one ABI")
        elif before is not None and (taken := succession.take_map(before, spec)) is not None:
            one = taken
            stack.callback(one.close)
            if one.info.max_entries == size:
                one.pin(str(path))
        else:
            one = _make(spec, size, stack)
            one.pin(str(path))
            made.append(spec.name)
        if one.info.max_entries != size and spec.name not in resize.NOT_IN_FORCE:
            # Pinned when it is in force.
            resized[spec.name] = resize.Resized(one, _make(spec, size, stack))
            resize.begin(spec.name, *resized[spec.name])
            one = resized[spec.name].now
        opened[spec.name] = one
    for name, keys in schema.OVERFLOW_KEYS.items():
        for key in keys:
            if opened[name].lookup(key.pack()) is None:
                opened[name].update(key.pack(), bytes(opened[name].value_size))
    return opened, made, resized


def _make(spec: schema.MapSpec, size: int, stack: ExitStack) -> maps.Map:
    inner: maps.Map | None = None
    btf: tuple[int, int, int] | None = None
    if spec.type == maps.HASH_OF_MAPS:
        model = schema.INNER[spec.name]
        inner = maps.Map.create(
            model.type, model.name, model.key_size, model.value_size, model.max_entries, flags=model.flags
        )
        stack.callback(inner.close)
    if spec.type == maps.SK_STORAGE:
        btf = maps.load_btf_of_bytes(spec.value_size)
        stack.callback(os.close, btf[0])
    one = maps.Map.create(
        spec.type,
        spec.kernel_name,
        spec.key_size,
        spec.value_size,
        size,
        flags=spec.flags,
        inner=inner,
        btf=btf,
    )
    stack.callback(one.close)
    return one


def _compile(
    opened: dict[str, maps.Map],
    macros: dict[str, int],
    resized: dict[str, resize.Resized],
    stack: ExitStack,
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Descriptors of all programs: for the cgroup and for namespaces by function, iterators by pin, what carries by map."""
    headers = kernel_headers()
    flags = [
        f"-I{_HERE}",
        # The headers' own, by the hundred.
        "-Wno-everything",
        *(f"-DMAP_{name.upper()}={one.fd}" for name, one in opened.items()),
        *(f"-D{name}={value}" for name, value in (macros | resize.macros(resized)).items()),
        *(
            f"-DSHARE_{name.upper()}={max(_LEAST_SHARE, opened[name].info.max_entries // parts)}"
            for name, parts in _SHARES.items()
        ),
    ]
    # bcc gives only functions of its main text a section of their own: the entry files are one text, headers included.
    text = "\n".join(
        f'#line 1 "{name}"\n{(_HERE / name).read_text()}'
        for name in (*_SOURCES, *(("carry.c",) if resized else ()))
    )

    def compile() -> compiled.Module:
        os.environ["BCC_KERNEL_SOURCE"] = str(headers)
        import bcc

        try:
            module: compiled.Module = bcc.BPF(text=text, cflags=flags)
        except Exception as error:
            raise LoadError(f"the programs do not compile: {error}") from None
        return module

    module = compiled.Compiled(
        compile,
        maps={name: one.fd for name, one in opened.items()}
        | {f"{name}_before": one.before.fd for name, one in resized.items()},
        key=(
            str(headers.resolve()),
            *sorted(resized),
            *(flag for flag in flags if not flag.startswith("-DMAP_")),
        ),
    )
    # Its descriptors are closed with the module.
    stack.callback(module.cleanup)
    programs: dict[str, int] = {}
    wanted = [(a.function, a.program_type, a.attach_type) for a in _CGROUP]
    wanted += [(p.function, p.program_type, p.attach_type) for p in _OF_PODS]
    wanted.append(("splice_message", links.PROG_SK_MSG, links.SK_MSG_VERDICT))
    for function, program_type, attach_type in wanted:
        try:
            programs[function] = module.load_func(function, program_type, attach_type=attach_type).fd
        except LoadError:
            raise
        except Exception as error:
            raise LoadError(f"program {function}: {error}") from None
    iterators: dict[str, int] = {}
    for one in _ITERATORS:
        iterators[one.pin] = links.load_tracing(
            one.pin, one.target, links.TRACE_ITER, module.dump_func(one.function)
        )
        stack.callback(os.close, iterators[one.pin])
    if links.has_target(_RECV_TRACEPOINT, links.TRACE_RAW_TP):
        for function in ("sock_recv_length", "sock_recv_length_entry"):
            code = module.dump_func(function)
            programs[function] = links.load_tracing(
                function[-15:], _RECV_TRACEPOINT, links.TRACE_RAW_TP, code
            )
            stack.callback(os.close, programs[function])
    carriers = resize.carriers(resized, module.dump_func)
    stack.callback(resize.close, carriers)
    return programs, iterators, carriers


def _attach(folder: Path, attachment: _Attachment, program: int, cgroup: int) -> bool:
    """Whether the link was there already (then it runs the new program from now on)."""
    path = folder / attachment.link
    if path.exists():
        link = links.open_pin(str(path))
        try:
            if links.link_info(link).where == os.fstat(cgroup).st_ino:
                links.replace(link, program)
                return True
        finally:
            os.close(link)
    link = links.attach(program, cgroup, attachment.attach_type)
    try:
        links.pin(link, str(path))
    finally:
        os.close(link)
    return False


def _attach_of_pods(folder: Path, places: _Places, program: int) -> int:
    """Replace the program wherever pods that are enrolled have it, and leave it for those to come; how many places."""
    links.pin(program, str(folder / places.pin))
    replaced = 0
    for path in folder.glob(places.links):
        link = links.open_pin(str(path))
        try:
            links.replace(link, program)
            replaced += 1
        except links.LinkError:
            # Its place is gone, and so is whom it guarded.
            path.unlink()
        finally:
            os.close(link)
    return replaced


def _drop_links_of_the_gone(folder: Path) -> None:
    for path in [path for places in _OF_PODS for path in folder.glob(places.links)]:
        link = links.open_pin(str(path))
        try:
            if links.link_info(link).where == 0:
                path.unlink()
        finally:
            os.close(link)


def _attach_iterator(path: Path, program: int, table: int | None) -> None:
    link = links.attach_iterator(program, table)
    try:
        links.pin(link, str(path))
    finally:
        os.close(link)


def _attach_splice(folder: Path, programs: dict[str, int], opened: dict[str, maps.Map]) -> None:
    """What the splice has besides its hooks in sock_ops. Without the tracepoint, or FIONREAD for it, it stays off.

    The tracepoint's own program stays as it is, and calls the one in the array: two that count what was read, for a moment,
    would let the splice lose its order.
    """
    has_tracepoint = _RECV_TRACEPOINT in programs
    if not has_tracepoint or not links.has_target(_FIONREAD, links.TRACE_FENTRY):
        opened["splice_counters"].update(
            struct.pack("=I", wire.SpliceCounter.OFF), struct.pack("=Q", wire.SPLICE_UNSUPPORTED)
        )
    if not has_tracepoint:
        return
    links.attach_to_map(programs["splice_message"], opened["splice_sockets"].fd, links.SK_MSG_VERDICT)
    opened["splice_programs"].update(bytes(4), struct.pack("=I", programs["sock_recv_length"]))
    if not (folder / _RECV_LINK).exists():
        link = links.attach_tracepoint(programs["sock_recv_length_entry"])
        try:
            links.pin(link, str(folder / _RECV_LINK))
        finally:
            os.close(link)


def _size(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    known = {spec.name for spec in schema.MAPS if spec.max_entries}
    if name not in known or not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not MAP=ELEMENTS (maps: {', '.join(sorted(known))})")
    return name, int(number)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bpf.loader", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pins", type=Path, required=True, help="folder on a bpf file system")
    parser.add_argument("--cgroup", type=Path, required=True, help="folder of the cgroup v2 hierarchy")
    parser.add_argument("--size", type=_size, action="append", default=[], metavar="MAP=ELEMENTS")
    parser.add_argument("--replace", action="store_true", help="also if the same programs are in force")
    options = parser.parse_args(arguments)
    try:
        done = load(options.pins, options.cgroup, dict(options.size), replace=options.replace)
    except LoadError as error:
        print(f"bpf.loader: {error}", file=sys.stderr)
        return 1
    print(json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
