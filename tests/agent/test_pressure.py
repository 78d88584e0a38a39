"""The alarm of maps that fill up, and that each map has its bounds and its declared verdict."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from agent import pressure
from agent.kernel import Pressure
from bpf import schema
from bpf.limits import LIMITS, UNSIZED, check


def test_every_map_has_bounds_and_says_what_happens_when_it_is_full():
    """A new map belongs into :mod:`bpf.limits`: with a size, or with why it has none."""
    assert {spec.name for spec in schema.MAPS} == LIMITS.keys() | UNSIZED.keys()
    assert not LIMITS.keys() & UNSIZED.keys()
    for spec in schema.MAPS:
        if spec.name in LIMITS:
            assert check(spec.name, spec.max_entries) == spec.max_entries
            assert LIMITS[spec.name].full
        else:
            assert UNSIZED[spec.name]


@pytest.fixture
def told(monkeypatch):
    class Log:
        def __init__(self):
            self.lines: list[str] = []

        def __getattr__(self, severity):
            return lambda event, **fields: self.lines.append(
                f"{severity} {fields['map']} {fields['entries']}"
            )

    log = Log()
    monkeypatch.setattr(pressure, "_log", log)
    return log.lines


def test_levels_are_told_once_and_end_below(told):
    alarm = pressure.Alarm(dict)
    for used in (79, 80, 94, 95, 100, 94, 91, 89, 81, 76, 74, 80):
        alarm.check({"captured": Pressure(used, 100, 0)})
    assert told == [
        "warning captured 80",
        "error captured 95",
        "info captured 89",
        "info captured 74",
        "warning captured 80",
    ]


def test_what_forgets_by_itself_and_what_has_no_size_never_alarm(told):
    alarm = pressure.Alarm(dict)
    alarm.check({"recent": Pressure(100, 100, 0), "sockets": Pressure(0, 0, 7)})
    assert told == []
    assert pressure.level("recent", Pressure(100, 100, 0)) == 0


def test_rules_are_about_metrics_that_there_are():
    text = Path("agent/metrics.py").read_text()
    rules = yaml.safe_load(Path("deploy/alerts.yaml").read_text())["groups"][0]["rules"]
    names = {name for rule in rules for name in re.findall(r"mycel_\w+", rule["expr"])}
    assert names
    for name in names:
        assert f'"{name.removesuffix("_total")}"' in text, name
