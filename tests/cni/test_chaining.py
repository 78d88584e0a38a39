"""Our entry in a node's CNI configuration: real files, the real installer as a child process, real notices of changes.

A test of ``conformance/cni`` has its case's id in its name.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import cni_chain, cni_node
from agent.cni_chain import ChainError, put_in, take_out, with_entry, without_entry

ENTRY = cni_node.entry(Path("/run/mycel"), Path("/sys/fs/bpf/mycel"), ("mycel-system", "kube-system"))

LIST = """{
  "name": "k8s-pod-network",
  "cniVersion": "1.0.0",
  "disableCheck": true,
  "plugins": [
    {
      "type": "bridge",   "bridge": "cni0",
      "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.1.0/24"}]]}
    },
    {"type": "portmap", "capabilities": {"portMappings": true}, "odd": "]}\\\\\\"", "big": 1.0e5}
  ]
}
"""


@pytest.fixture
def conf(tmp_path):
    folder = tmp_path / "net.d"
    folder.mkdir()
    return folder


def plugins(file):
    return [plugin["type"] for plugin in json.loads(file.read_text())["plugins"]]


def test_chn_01_appended_once(conf):
    file = conf / "10-pods.conflist"
    file.write_text(LIST)
    file.chmod(0o640)
    state = put_in(conf, ENTRY)
    assert (state.file, state.changed, state.problem) == (file, ["10-pods.conflist"], "")
    whole = json.loads(file.read_text())
    assert whole.pop("plugins") == [*json.loads(LIST)["plugins"], ENTRY]
    assert whole == {key: value for key, value in json.loads(LIST).items() if key != "plugins"}
    # Not in meaning alone: every byte of the others stands.
    assert file.read_text().replace(",\n    " + _entry_text(file), "") == LIST
    assert file.stat().st_mode & 0o777 == 0o640
    before = file.stat()
    assert put_in(conf, ENTRY).changed == []
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert os.listdir(conf) == ["10-pods.conflist"]


def _entry_text(file):
    text = file.read_text()
    begin = text.rindex("{", 0, text.index('"mycel"'))
    return text[begin : text.index("\n    }", begin) + len("\n    }")]


def test_chn_02_taken_out(conf):
    file = conf / "10-pods.conflist"
    file.write_text(LIST)
    put_in(conf, ENTRY)
    assert take_out(conf) == ["10-pods.conflist"]
    assert file.read_text() == LIST
    assert take_out(conf) == []


def test_chn_02_taken_out_after_another_tool_edited_it(conf):
    file = conf / "10-pods.conflist"
    file.write_text(LIST)
    put_in(conf, ENTRY)
    edited = json.loads(file.read_text())
    edited["plugins"].append({"type": "bandwidth"})
    edited["plugins"][0]["mtu"] = 1400
    file.write_text(json.dumps(edited))
    take_out(conf)
    expected = json.loads(LIST)
    expected["plugins"].append({"type": "bandwidth"})
    expected["plugins"][0]["mtu"] = 1400
    assert json.loads(file.read_text()) == expected


async def until(condition, what):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (files change, nobody says so)
            await asyncio.sleep(0.01)
    assert condition(), what


class Watched(cni_node.CniNode):
    """Puts right what changes, until stopped."""

    def __init__(self, binaries: Path, conf: Path) -> None:
        super().__init__(cni_node.Settings(binaries, conf, ENTRY, bundle=None))
        self.binaries, self.conf = binaries, conf
        self.task = asyncio.create_task(self.watch())

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
async def node(tmp_path, conf):
    """What the agent runs, over folders of the test's own."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    made = Watched(binaries, conf)
    yield made
    await made.stop()


async def test_chn_03_chained_again(node):
    file = node.conf / "10-pods.conflist"
    await until(lambda: "no network configuration" in node.problem, "the folder is empty")
    file.write_text(LIST)
    await until(lambda: not node.problem, "chained when the network comes")
    assert plugins(file)[-1] == "mycel"
    for subnet in ("10.1.0.0/24", "10.2.0.0/24"):
        file.write_text(LIST.replace("10.244.1.0/24", subnet))
        await until(lambda: plugins(file)[-1] == "mycel", "chained again")
        assert subnet in file.read_text()
    # In place, in pieces: what is half written is nobody's list, and nothing of ours is put into another's.
    with file.open("w") as out:
        for n in range(0, len(LIST), 40):
            out.write(LIST[n : n + 40])
            out.flush()
            await asyncio.sleep(0.01)
    await until(lambda: plugins(file)[-1] == "mycel" and not node.problem, "chained again")


async def test_the_entry_waits_until_it_may(tmp_path, conf):
    """An installation whose controllers never come stops no pod; what an earlier agent put in stays."""
    (tmp_path / "bin").mkdir()
    file = conf / "10-pods.conflist"
    file.write_text(LIST)
    settings = cni_node.Settings(tmp_path / "bin", conf, ENTRY, bundle=None)
    made = cni_node.CniNode(settings, holds_back=True)
    await made.put_in_place()
    assert (tmp_path / "bin/mycel").exists()
    assert file.read_text() == LIST
    assert made.problem
    watching = asyncio.create_task(made.watch())
    try:
        made.go_ahead()
        await until(lambda: not made.problem, "chained")
        assert plugins(file)[-1] == "mycel"
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    before = file.read_text()
    await cni_node.CniNode(settings, holds_back=True).put_in_place()
    assert file.read_text() == before


async def test_chn_03_another_list_becomes_first(node):
    old, new = node.conf / "10-pods.conflist", node.conf / "05-new.conflist"
    old.write_text(LIST)
    await until(lambda: not node.problem, "chained")
    aside = node.conf / ".new"
    aside.write_text(LIST.replace("cni0", "cni1"))
    aside.rename(new)
    await until(lambda: plugins(new)[-1] == "mycel", "chained into the new one")
    await until(lambda: old.read_text() == LIST, "and out of the old one")
    new.unlink()
    await until(lambda: plugins(old)[-1] == "mycel", "and back")


async def test_the_launcher_is_put_back(node):
    (node.conf / "10-pods.conflist").write_text(LIST)
    await until(lambda: not node.problem, "in place")
    launcher = node.binaries / "mycel"
    text = launcher.read_text()
    launcher.unlink()
    await until(launcher.exists, "put back")
    launcher.write_text("#!/bin/false\n")
    await until(lambda: launcher.read_text() == text, "put right")


async def test_no_entry_without_binaries(node):
    """What cannot be put right is taken out of the list, so that the node's pods still start."""
    file = node.conf / "10-pods.conflist"
    file.write_text(LIST)
    await until(lambda: not node.problem, "in place")
    (node.binaries / "mycel").unlink()
    node.binaries.rename(node.binaries.with_name("gone"))
    node.binaries.write_text("no folder")
    await until(lambda: file.read_text() == LIST, "the entry is out")
    assert "cannot be put in place" in node.problem
    node.binaries.unlink()
    node.binaries.mkdir()
    await until(lambda: plugins(file)[-1] == "mycel" and not node.problem, "and in again")


async def test_the_entry_goes_before_the_binaries(node):
    file = node.conf / "10-pods.conflist"
    file.write_text(LIST)
    await until(lambda: not node.problem, "in place")
    await node.stop()
    seen = []
    ended = threading.Event()

    def look():
        while not ended.is_set():
            listed = "mycel" in plugins(file)
            seen.append((listed, (node.binaries / "mycel").exists() or not listed))

    thread = threading.Thread(target=look)
    thread.start()
    await node.take_out()
    ended.set()
    thread.join()
    assert (True, True) in seen
    assert all(good for _, good in seen)
    assert file.read_text() == LIST
    assert os.listdir(node.binaries) == []


def test_chn_04_old_or_new_never_a_part(conf):
    file = conf / "10-pods.conflist"
    file.write_text(LIST)
    put_in(conf, ENTRY)
    chained = file.read_text()
    seen, ended = set(), threading.Event()

    def read():
        while not ended.is_set():
            seen.add(file.read_text())

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(200):
        take_out(conf)
        put_in(conf, ENTRY)
    ended.set()
    thread.join()
    assert seen == {LIST, chained}


CONF = '{"cniVersion": "0.3.1", "name": "old", "type": "bridge", "bridge": "cni0", "ipam": {"type": "dhcp"}}'


@pytest.mark.parametrize("name", ["10-old.conf", "10-old.json"])
def test_chn_05_a_single_plugin_is_wrapped(conf, name):
    (conf / name).write_text(CONF)
    state = put_in(conf, ENTRY)
    assert state.problem == ""
    wrapper = conf / cni_chain.WRAPPER
    assert state.file == wrapper
    assert sorted(os.listdir(conf))[0] == cni_chain.WRAPPER  # the runtime takes the first
    whole = json.loads(wrapper.read_text())
    assert (whole["cniVersion"], whole["name"]) == ("0.3.1", "old")
    assert whole["plugins"] == [{"type": "bridge", "bridge": "cni0", "ipam": {"type": "dhcp"}}, ENTRY]
    assert put_in(conf, ENTRY).changed == []
    # What its owner changes is taken over, and what he replaces by a list needs no wrapper.
    (conf / name).write_text(CONF.replace("cni0", "cni9"))
    put_in(conf, ENTRY)
    assert json.loads(wrapper.read_text())["plugins"][0]["bridge"] == "cni9"
    (conf / name).unlink()
    (conf / "10-new.conflist").write_text(LIST)
    put_in(conf, ENTRY)
    assert os.listdir(conf) == ["10-new.conflist"]


def test_chn_05_and_unwrapped(conf):
    (conf / "10-old.conf").write_text(CONF)
    put_in(conf, ENTRY)
    assert take_out(conf) == [cni_chain.WRAPPER]
    assert os.listdir(conf) == ["10-old.conf"]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("10-old.conf", CONF.replace("0.3.1", "0.2.0"), "cniVersion 0.2.0 is not supported"),
        ("10-old.conf", CONF.replace('"cniVersion": "0.3.1", ', ""), "cniVersion 0.1.0 is not supported"),
        ("!!.conf", CONF, "rename it"),
        ("10.conflist", LIST.replace("1.0.0", "1.2.0"), "cniVersion 1.2.0 is not supported"),
        (
            "10.conflist",
            LIST.replace('"cniVersion"', '"cniVersions": ["1.1.0", "1.10.0"], "cniVersion"'),
            "1.10.0",
        ),
        ("10.conflist", '{"cniVersion": "1.0.0", "name": "n", "plugins": []}', "plugins is empty"),
        ("10.conflist", '{"cniVersion": "1.0.0", "plugins": []}', "name is missing"),
        ("10.conflist", LIST[:50], "no JSON"),
        ("10.conflist", LIST.replace('"type": "portmap", ', ""), "plugins[1].type"),
    ],
)
def test_what_cannot_be_chained_is_said_and_left_alone(conf, name, text, reason):
    """A version that our plugin does not speak would stop every pod of the node."""
    (conf / name).write_text(text)
    state = put_in(conf, ENTRY)
    assert state.file is None
    assert reason in state.problem
    assert name in state.problem
    assert os.listdir(conf) == [name]
    assert (conf / name).read_text() == text


def test_a_list_that_cannot_be_chained_any_more(conf):
    """The entry is not left behind in a list whose version became one that we do not speak."""
    (conf / "10.conflist").write_text(LIST)
    put_in(conf, ENTRY)
    (conf / "10.conflist").write_text((conf / "10.conflist").read_text().replace("1.0.0", "1.2.0"))
    assert "1.2.0" in put_in(conf, ENTRY).problem
    assert "mycel" not in plugins(conf / "10.conflist")


def test_what_is_no_configuration_is_passed_over(conf):
    (conf / "00-broken.conflist").write_text("{")
    (conf / "05-folder.conflist").mkdir()
    (conf / "06-notes.txt").write_text("x")
    (conf / "10.conflist").write_text(LIST)
    assert put_in(conf, ENTRY).file == conf / "10.conflist"


def test_an_older_entry_of_ours_is_replaced(conf):
    file = conf / "10.conflist"
    file.write_text(LIST)
    put_in(conf, {"type": "mycel", "runDir": "/elsewhere"})
    put_in(conf, ENTRY)
    assert [p for p in json.loads(file.read_text())["plugins"] if p["type"] == "mycel"] == [ENTRY]
    take_out(conf)
    assert file.read_text() == LIST


def test_other_tools_entries_behind_ours(conf):
    """Ours is the last again: it has to see what all others did."""
    file = conf / "10.conflist"
    file.write_text(LIST)
    put_in(conf, ENTRY)
    whole = json.loads(file.read_text())
    whole["plugins"].append({"type": "istio-cni"})
    file.write_text(json.dumps(whole))
    put_in(conf, ENTRY)
    assert plugins(file) == ["bridge", "portmap", "istio-cni", "mycel"]


def test_written_meanwhile(conf, monkeypatch):
    """What another tool writes between our reading and our writing is not lost."""
    file = conf / "10.conflist"
    file.write_text(LIST)
    newer = LIST.replace("cni0", "cni7")
    real = os.fsync

    def write_between(fd):
        file.write_text(newer)
        real(fd)

    monkeypatch.setattr(os, "fsync", write_between)
    state = put_in(conf, ENTRY)
    assert state.file is None
    assert "being written" in state.problem
    assert file.read_text() == newer
    monkeypatch.undo()
    assert put_in(conf, ENTRY).problem == ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
PLUGIN = st.dictionaries(st.text(), JSON, max_size=4).map(lambda d: {**d, "type": "bridge"})


@given(
    st.lists(PLUGIN, min_size=1, max_size=4),
    st.dictionaries(st.text(), JSON, max_size=4),
    st.sampled_from([None, 0, 1, 4, "\t"]),
    st.booleans(),
)
def test_any_list_in_any_form_comes_back_as_it_was(others, more, indent, ascii_only):
    whole = {**more, "cniVersion": "1.1.0", "name": "n", "plugins": others}
    whole.pop("cniVersions", None)
    text = json.dumps(whole, indent=indent, ensure_ascii=ascii_only)
    chained = with_entry(text, ENTRY)
    assert json.loads(chained) == {**whole, "plugins": [*others, ENTRY]}
    assert with_entry(chained, ENTRY) == chained
    assert without_entry(chained) == text


@given(st.text() | JSON.map(json.dumps))
def test_any_text_is_chained_or_refused(text):
    for change in (
        lambda t: with_entry(t, ENTRY),
        without_entry,
        lambda t: cni_chain.wrapped(t, "a.conf", ENTRY),
    ):
        try:
            change(text)
        except ChainError:
            pass
