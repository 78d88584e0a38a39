"""The contract between programs and user space, as the kernel has it, and maps read and written by ctypes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
from pathlib import Path

import pytest

from bpf import compiled, links, wire
from bpf.btf import Btf
from bpf.maps import CapturedMap, Map, MapError
from tests.kernel.mesh import Node

pytestmark = pytest.mark.privileged


def test_proxies_read_captured_without_capabilities(node):
    """``unprivileged_bpf_disabled`` forbids making maps, not using what was handed over; and read-only is read-only."""
    fd = node.kernel.captured_fd()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            table = CapturedMap(fd)
            assert "CapEff:\t0000000000000000" in Path("/proc/self/status").read_text()
            assert table.find(1, "10.0.0.1", 1, wire.PORT_OUTBOUND) is None
            try:
                table.update(bytes(table.key_size), bytes(table.value_size))
            except MapError as error:
                status = 0 if error.errno == errno.EPERM else 2
        finally:
            os._exit(status)
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


#: What is a structure within a structure in C, and stands flat here.
NESTED = re.compile(r"^tuple\.|^endpoint\.|^flow\.|\.word$")
RECORDS = [value for value in vars(wire).values() if isinstance(value, type) and hasattr(value, "LAYOUT")]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.LAYOUT.tag)
def test_layout_is_that_of_the_loaded_programs(programs_btf, record):
    """Every member, by name, offset and size, as the kernel has the programs' types."""
    layout = record.LAYOUT
    compiled = [
        (NESTED.sub("", m.name), (m.offset, m.size)) for btf in programs_btf for m in members(btf, layout.tag)
    ]
    assert compiled, f"no program has struct {layout.tag}"
    assert dict(compiled) == layout.offsets
    assert {size for btf in programs_btf if (size := size_of(btf, layout.tag))} == {layout.size}


def members(btf, tag):
    try:
        return btf.members(tag)
    except Exception:
        return []


def size_of(btf, tag):
    try:
        return btf.size(tag)
    except Exception:
        return None


@pytest.fixture(scope="module")
def programs_btf(tmp_path_factory):
    """Of programs compiled now: those that were kept have no BTF, and others' tests may have loaded such ones."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.delenv(compiled.FOLDER, raising=False)
        fresh = stack.enter_context(contextlib.closing(Node(tmp_path_factory.mktemp("layout"))))
        found = []
        for name in ("link_connect4", "link_sock_ops", "link_sock_create"):
            link = links.open_pin(str(fresh.pins / f"v{wire.ABI}" / name))
            number = links.program_btf_id(links.link_info(link).program)
            os.close(link)
            found.append(stack.enter_context(Btf.of_id(number)))
        yield found


def test_private_layout_and_constants(programs_btf):
    assert size_of(programs_btf[0], "socket_state") == wire.SOCKET_STATE_SIZE
    assert size_of(programs_btf[0], "splice_end") == wire.SPLICE_END_SIZE
    assert size_of(programs_btf[0], "splice") == wire.SPLICE_SIZE
    header = Path(wire.__file__).with_name("wire.h").read_text()
    defined = dict(re.findall(r"#define (\w+) (\w+)", header))
    for name in (
        "PORT_OUTBOUND",
        "PORT_OUTBOUND_L7",
        "PORT_HBONE",
        "PEER_LOCAL",
        "PEER_ENROLLED",
        "PEER_JOINING",
        "POD_PASSING",
        "POD_OPEN",
        "POD_NO_SPLICE",
        "INTERFACE_FILTERS",
        "SERVICE_L7",
        "SERVICE_AFFINITY",
        "SERVICE_MEMBERS",
        "SERVICE_FEW",
        "FEW_BACKENDS",
        "DRAWS",
        "CHECK_SEED",
        "CHECK_PRIME",
        "CHECK_FOLD",
        "SOCKET_REVOKED",
        "VERDICT_ALLOWED",
        "VERDICT_SEVERAL",
        "CLOSED_SLOTS",
        "FLOW_FORGOTTEN",
        "POLICY_GENERATION",
        "IDENTITY_PLAIN",
        "IDENTITY_PROBE",
        "IDENTITY_TUNNEL",
        "IDENTITY_FIRST",
    ):
        assert getattr(wire, name) == int(defined[name], 0), name
    assert int(defined["MYCEL_ABI"]) == wire.ABI
    for prefix, values in (
        ("ROLE", wire.Role),
        ("VIA", wire.Via),
        ("REASON", wire.Reason),
        ("DIRECTION", wire.Direction),
    ):
        in_header = {
            name: int(value)
            for name, value in re.findall(rf"\b{prefix}_(\w+) = (\d+),", header)
            if name != "COUNT"
        }
        assert in_header == {value.name: value.value for value in values}
    counters = re.search(r"enum counter {(.*?)}", header, re.S)
    assert counters
    names = re.findall(r"COUNTER_(\w+)", counters[1])
    [reason_count] = map(int, re.findall(r"REASON_COUNT = (\d+)", header))
    expected = {f"FULL_{name.upper()}": slot for name, slot in wire.COUNTER_FULL.items()}
    expected |= {f"SHARE_{name.upper()}": slot for name, slot in wire.COUNTER_SHARE.items()}
    expected["COUNT"] = wire.COUNTERS
    assert {name: reason_count + index for index, name in enumerate(names)} == expected


def test_map_elements_come_back_as_they_went(node):
    with Map.create(1, "round", 8, wire.Peer.LAYOUT.size, 3000, flags=1) as table:
        written = {struct.pack("=Q", n): wire.Peer(n, n + 1, 3).pack() for n in range(2500)}
        for key, value in written.items():
            table.update(key, value)
        assert dict(table.items()) == written
        assert len(table.items()) == len(table) == 2500
        assert set(table.keys()) == set(written)
        assert table.delete(struct.pack("=Q", 7)) and not table.delete(struct.pack("=Q", 7))
        assert table.lookup(struct.pack("=Q", 7)) is None
        with pytest.raises(ValueError, match="key of 3 bytes"):
            table.lookup(b"abc")
