"""The contract between plugin and agent."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cni_service import CniService, _limit, attachment_of, key_of
from agent.pods import Attachment, AttachmentKey, Refusal
from cni import protocol


def test_golden_request():
    data = protocol.request(
        "ADD",
        container_id="c",
        ifname="eth0",
        network="pods",
        netns="/run/netns/x",
        addresses=["10.0.0.2"],
        pod_uid="u",
        pod_namespace="ns",
        pod_name="p",
        patience_ms=15000,
    )
    assert json.loads(data) == {
        "version": 1,
        "command": "ADD",
        "container_id": "c",
        "ifname": "eth0",
        "network": "pods",
        "netns": "/run/netns/x",
        "addresses": ["10.0.0.2"],
        "pod_uid": "u",
        "pod_namespace": "ns",
        "pod_name": "p",
        "valid_attachments": None,
        "patience_ms": 15000,
    }
    assert attachment_of(protocol.decode(data)) == Attachment(
        "c", "eth0", "pods", "/run/netns/x", ("10.0.0.2",), "u", "ns", "p"
    )


def test_golden_reply():
    assert json.loads(protocol.reply(code=11, message="m", details="d")) == {
        "version": 1,
        "code": 11,
        "message": "m",
        "details": "d",
    }


def test_a_later_version_may_add_fields():
    assert protocol.decode(b'{"version": 1, "code": 0, "new": [1]}')["new"] == [1]


@pytest.mark.parametrize("version", ["0", "2", "99", "-1", '"1"', "null", "[1]"])
def test_versions_that_are_not_served(version):
    with pytest.raises(protocol.ProtocolError, match="version"):
        protocol.decode(f'{{"version": {version}}}'.encode())


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_decoding_gives_a_message_or_our_error(data):
    try:
        assert isinstance(protocol.decode(data), dict)
    except protocol.ProtocolError:
        pass


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)


@given(
    st.dictionaries(
        st.sampled_from(["container_id", "ifname", "addresses", "netns", "pod_uid", "network"]), json_values
    )
)
def test_fields_of_any_type_make_an_attachment(fields):
    assert isinstance(attachment_of(fields), Attachment)
    assert isinstance(key_of(fields), AttachmentKey)


class Recorder:
    """In the node's place."""

    def __init__(self) -> None:
        self.deleted: list[AttachmentKey] = []
        self.refuses: set[str] = set()

    async def add(self, attachment, netns) -> None: ...

    async def check(self, attachment, netns) -> None: ...

    async def collect(self, network, valid) -> None: ...

    async def status(self) -> None: ...

    async def delete(self, key) -> None:
        if key.container_id in self.refuses:
            raise Refusal(11, "not now")
        self.deleted.append(key)


async def test_notes_are_worked_off_in_order_and_kept_when_they_fail(tmp_path):
    for container in ("a", "b", "c"):
        protocol.write_note(
            str(tmp_path), protocol.request("DEL", container_id=container, ifname="eth0", network="n")
        )
    folder = tmp_path / protocol.NOTES
    (folder / "0-broken").write_text("{")
    (folder / ".half-written").write_text("{")
    assert folder.stat().st_mode & 0o777 == 0o700
    target = Recorder()
    target.refuses = {"b"}
    service = CniService(tmp_path, target, latencies=lambda *_: None)
    await service.work_off_notes()
    assert [key.container_id for key in target.deleted] == ["a", "c"]
    assert len(os.listdir(folder)) == 2
    target.refuses = set()
    await service.work_off_notes()
    assert [key.container_id for key in target.deleted] == ["a", "c", "b"]
    assert os.listdir(folder) == [".half-written"]


async def test_no_notes_no_folder(tmp_path):
    await CniService(tmp_path, Recorder(), latencies=lambda *_: None).work_off_notes()


@pytest.mark.parametrize(
    ("patience", "limit"),
    [(15000, 13.0), (40000, 38.0), (1000, 13.0), (10**9, 58.0), (None, 13.0), (True, 13.0), ("40000", 13.0)],
)
def test_request_may_take_what_its_plugin_waits(patience, limit):
    """And a plugin of before does not say."""
    assert _limit({"patience_ms": patience}) == limit
    assert _limit({}) == 13.0
