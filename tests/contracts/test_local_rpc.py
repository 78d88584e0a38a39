"""Local RPC, plugin protocol and handed-over streams: golden bytes, skew, and what is no message at all."""

import os
import socket
from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import api as agent_api
from cni import protocol
from common import seqpacket
from nodeproxy import api as handoff


def pair() -> tuple[socket.socket, socket.socket]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    seqpacket.prepare(left)
    seqpacket.prepare(right)
    return left, right


def test_a_packet_carries_its_descriptors() -> None:
    left, right = pair()
    reader, writer = os.pipe()
    with left, right:
        seqpacket.send(left, b"take this", (writer,))
        os.close(writer)
        message, fds = seqpacket.receive(right)
        assert message == b"take this"
        os.write(fds[0], b"through")
        os.close(fds[0])
        assert os.read(reader, 16) == b"through"
        assert os.read(reader, 16) == b""  # nobody holds a duplicate
        left.close()
        assert seqpacket.receive(right) == (b"", ())
    os.close(reader)


def test_the_largest_message_fits_and_a_larger_one_is_refused() -> None:
    left, right = pair()
    with left, right:
        seqpacket.send(left, b"x" * seqpacket.MAX_MESSAGE)
        assert len(seqpacket.receive(right)[0]) == seqpacket.MAX_MESSAGE
        with pytest.raises(seqpacket.PacketError, match="at most"):
            seqpacket.send(left, b"x" * (seqpacket.MAX_MESSAGE + 1))
        left.send(b"x" * (seqpacket.MAX_MESSAGE + 1))
        with pytest.raises(seqpacket.PacketError, match="cut"):
            seqpacket.receive(right)


def test_local_rpc_of_a_newer_peer_is_understood() -> None:
    enroll = agent_api.Enroll("uid", 7, "10.0.0.1", "ns", "pod", "sa", "spiffe://td/ns/ns/sa/sa")
    newer = msgspec.msgpack.decode(agent_api.encode(enroll))
    newer["added_later"] = {"x": 1}
    assert agent_api.decode_from_agent(msgspec.msgpack.encode(newer)) == enroll


def test_local_rpc_golden_bytes() -> None:
    # What an agent of version 1 sends today must be read by every later one.
    golden = bytes.fromhex("83a474797065a87769746864726177a3756964a175ac6e65746e735f636f6f6b696507")
    assert agent_api.encode(agent_api.Withdraw("u", 7)) == golden
    assert agent_api.decode_from_agent(golden) == agent_api.Withdraw("u", 7)


@given(st.binary(max_size=200))
def test_local_rpc_garbage_is_an_error_of_its_own(data: bytes) -> None:
    for decode in (agent_api.decode_from_proxy, agent_api.decode_from_agent):
        try:
            decode(data)
        except msgspec.DecodeError:
            pass


def test_plugin_protocol() -> None:
    message = protocol.decode(
        protocol.request("ADD", container_id="c", ifname="eth0", network="n", pod_uid="u")
    )
    assert (message["command"], message["pod_uid"], message["addresses"]) == ("ADD", "u", [])
    assert protocol.decode(protocol.reply(code=11, message="later"))["code"] == 11
    for data in (b"", b"[]", b"{}", b'{"version": 99}', b'{"version": 0}', b"\xff"):
        with pytest.raises(protocol.ProtocolError):
            protocol.decode(data)


addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
ports = st.integers(0, 65535)


@given(
    st.sampled_from((4, 6)),
    st.data(),
    st.dictionaries(st.integers(0xE0, 0xEF), st.binary(max_size=64), max_size=3),
)
def test_handoff_round_trip_whole_and_byte_by_byte(
    version: Literal[4, 6], data: st.DataObject, tlvs: dict[int, bytes]
) -> None:
    address = (st.ip_addresses(v=4) if version == 4 else st.ip_addresses(v=6)).map(str)
    one = handoff.Handoff(
        (data.draw(address), data.draw(ports)), (data.draw(address), data.draw(ports)), tlvs
    )
    encoded = handoff.encode(one)
    assert handoff.decode(encoded + b"payload") == (one, len(encoded))
    for cut in range(len(encoded)):
        assert handoff.decode(encoded[:cut]) is None


@given(st.binary(max_size=80))
def test_handoff_garbage(data: bytes) -> None:
    for candidate in (data, handoff.SIGNATURE + data):
        try:
            handoff.decode(candidate)
        except handoff.HeaderError:
            pass


def test_handoff_golden_bytes() -> None:
    # proxy-protocol.txt 2.2: signature, 0x21, TCP over IPv4, length, addresses, ports, TLV
    golden = handoff.SIGNATURE + bytes.fromhex(
        "2111 0011 0a000001 0a000002 9c40 0050 e0 0002 7569".replace(" ", "")
    )
    one = handoff.Handoff(("10.0.0.1", 40000), ("10.0.0.2", 80), {handoff.Tlv.SOURCE_UID: b"ui"})
    assert handoff.encode(one) == golden
    assert handoff.decode(golden) == (one, len(golden))
    assert one.source_uid == "ui"
