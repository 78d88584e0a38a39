import argparse
import io
import ipaddress
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import logs


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Levels and handlers are the process's own: give them back as they were."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    before = {
        name: logger.level
        for name, logger in root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
    }
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, logger in root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger):
            logger.setLevel(before.get(name, logging.NOTSET))


def json_lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_has_the_event_and_its_fields() -> None:
    stream = io.StringIO()
    logs.setup("info", "json", stream)
    logs.get("test.unit").info(
        "connection accepted", peer=ipaddress.ip_address("10.0.0.1"), port=80, path=Path("/x")
    )
    [line] = json_lines(stream)
    time = line.pop("time")
    assert line == {
        "level": "info",
        "logger": "test.unit",
        "event": "connection accepted",
        "peer": "10.0.0.1",
        "port": 80,
        "path": "/x",
    }
    assert isinstance(time, str)
    assert time.endswith("Z")
    assert len(time) == len("2026-01-01T00:00:00.000000Z")


def test_a_field_hides_neither_the_line_nor_logging_s_own_names() -> None:
    stream = io.StringIO()
    logs.setup("info", "json", stream)
    logs.get("test.unit").info("event", level="mine", name="n", msg="m", args=1, exc_info="e")
    [line] = json_lines(stream)
    assert line["level"] == "info"
    assert line["field_level"] == "mine"
    assert (line["name"], line["msg"], line["args"], line["exc_info"]) == ("n", "m", 1, "e")


def test_bound_fields_are_on_every_line_and_nowhere_else() -> None:
    stream = io.StringIO()
    logs.setup("info", "json", stream)
    log = logs.get("test.unit")
    bound = log.bind(connection=7).bind(peer="a")
    bound.info("one", bytes=1)
    bound.warning("two", peer="b")
    log.error("three")
    one, two, three = json_lines(stream)
    assert (one["connection"], one["peer"], one["bytes"]) == (7, "a", 1)
    assert (two["connection"], two["peer"]) == (7, "b")
    assert "connection" not in three


def test_text_is_one_line_that_reads() -> None:
    stream = io.StringIO()
    logs.setup("info", "text", stream)
    logs.get("test.unit").info(
        "route chosen", host="web", reason="a b", empty="", forged='x" level=error\nnext line'
    )
    _, rest = stream.getvalue().split(" ", 1)
    assert rest == (
        'info    test.unit route chosen host=web reason="a b" empty="" forged="x\\" level=error\\nnext line"\n'
    )


@given(st.text())
def test_whatever_a_peer_sends_stays_one_line(value: str) -> None:
    stream = io.StringIO()
    logs.setup("info", "text", stream)
    logs.get("test.unit").info("event", value=value)
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue()[:-1].isprintable()


@pytest.mark.parametrize("format", ["text", "json"])
def test_an_exception_brings_its_traceback(format: str) -> None:
    stream = io.StringIO()
    logs.setup("info", format, stream)
    try:
        raise RuntimeError("no route")
    except RuntimeError as error:
        logs.get("test.unit").exception("failed", attempt=1)
        kept = error
    logs.get("test.unit").exception("failed later", kept)
    assert stream.getvalue().count("RuntimeError: no route") == 2
    assert stream.getvalue().count("Traceback") == 2


def test_other_libraries_lines_come_out_too() -> None:
    stream = io.StringIO()
    logs.setup("info", "json", stream)
    logging.getLogger("library").warning("%d left", 3)
    [line] = json_lines(stream)
    assert (line["logger"], line["event"]) == ("library", "3 left")


def test_levels_change_at_run_time_for_all_or_for_one_subtree() -> None:
    stream = io.StringIO()
    logs.setup("info", "json", stream)
    inside, outside = logs.get("test.agent.cni"), logs.get("test.proxy")
    inside.debug("hidden")
    logs.set_levels("error, test.agent:debug")
    inside.debug("inside")
    outside.warning("hidden")
    assert inside.enabled("debug")
    assert not outside.enabled("warning")
    assert [line["event"] for line in json_lines(stream)] == ["inside"]
    assert logs.levels()[""] == "error"
    assert logs.levels()["test.agent"] == "debug"


def test_a_bad_level_changes_nothing() -> None:
    logs.setup("info", "text", io.StringIO())
    before = logs.levels()
    with pytest.raises(logs.LevelError, match="'loud'"):
        logs.set_levels("test.unit:debug,loud")
    assert logs.levels() == before


def test_a_second_setup_replaces_the_first_and_leaves_other_handlers() -> None:
    other = logging.NullHandler()
    logging.getLogger().addHandler(other)
    first, second = io.StringIO(), io.StringIO()
    logs.setup("info", "text", first)
    logs.setup("info", "text", second)
    logs.get("test.unit").info("event")
    assert not first.getvalue()
    assert second.getvalue().count("event") == 1
    assert other in logging.getLogger().handlers


def test_flags_default_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYCEL_LOG_LEVEL", "debug")
    monkeypatch.setenv("MYCEL_LOG_FORMAT", "json")
    parser = argparse.ArgumentParser()
    logs.add_arguments(parser)
    assert vars(parser.parse_args([])) == {"log_level": "debug", "log_format": "json"}
    assert vars(parser.parse_args(["--log-level", "error", "--log-format", "text"])) == {
        "log_level": "error",
        "log_format": "text",
    }
