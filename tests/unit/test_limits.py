"""Sizes of kernel maps as configuration gives them."""

from __future__ import annotations

import pytest

from agent.__main__ import parse
from bpf import limits
from bpf.limits import SizeError
from deploy import values

_NEEDED = ["--node", "n", "--cgroup", "/c", "--controller", "c:1", "--roots", "/r", "--credential", "/t"]


def test_sizes_of_flags_come_together():
    options = parse([*_NEEDED, "--map-size=pods=2048,events=8192", "--map-size=", "--map-size", "peers=5000"])
    assert options.map_sizes == {"pods": 2048, "events": 8192, "peers": 5000}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pods=5", "map pods: 5 is not from 16 to 65536"),
        ("pods=99999999", "map pods: 99999999 is not from 16 to 65536"),
        ("pods", "'pods' is not NAME=ELEMENTS"),
        ("pods=", "'pods=' is not NAME=ELEMENTS"),
        ("pods=-1", "'pods=-1' is not NAME=ELEMENTS"),
        ("counters=100", "map 'counters': there is no such map with a size"),
        ("events=10000", "map events: 10000 is no power of two"),
        ("pods=100,pods=200", "map pods: two sizes, 100 and 200"),
    ],
)
def test_what_is_refused_is_named(text, said, capsys):
    with pytest.raises(SizeError) as refused:
        limits.parse_all(text.split(","))
    assert said in str(refused.value)
    with pytest.raises(SystemExit):
        parse([*_NEEDED, f"--map-size={text}"])
    assert said in capsys.readouterr().err
    with pytest.raises(values.ValuesError, match=r"agent\.mapSizes"):
        values.load(settings=[f"agent.mapSizes=[{text}]"])


def test_values_that_are_taken():
    assert values.load(settings=["agent.mapSizes=[pods=2048]"]).agent.map_sizes == ("pods=2048",)
