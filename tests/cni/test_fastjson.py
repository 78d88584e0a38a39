"""The plugin's JSON says what the standard library's does."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni import fastjson
from tests.requirements import ROOT

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES, st.sampled_from([None, 1, "\t"]), st.booleans())
def test_any_value_goes_both_ways(value, indent, ascii_only):
    assert fastjson.dumps(value) == json.dumps(value)
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    try:
        data = f" \n{text}\t".encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no UTF-8 has it
        return
    assert json.dumps(fastjson.loads(data)) == json.dumps(json.loads(data))


@given(st.binary() | st.text().map(str.encode) | VALUES.map(lambda value: json.dumps(value).encode()[:-1]))
def test_any_bytes_are_read_or_refused_alike(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        with pytest.raises(ValueError):
            fastjson.loads(data)
        return
    try:
        wanted = json.dumps(json.loads(data.decode().removeprefix("\ufeff")))
    except ValueError:
        with pytest.raises(ValueError):
            fastjson.loads(data)
    else:
        assert json.dumps(fastjson.loads(data)) == wanted


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Expecting value: line 1 column 1"),
        (b"[1,]", "Expecting value: line 1 column 4"),
        (b" {} x", "Extra data: line 1 column 4"),
        (b'{"a" 1}', "delimiter"),
        (b"\xff", "can't decode byte 0xff"),
        (b'"a', "Unterminated string"),
    ],
)
def test_what_is_wrong_and_where(data, reason):
    with pytest.raises(ValueError, match=reason):
        fastjson.loads(data)


def test_a_byte_order_mark_is_passed_over():
    assert fastjson.loads(b"\xef\xbb\xbf[1]") == [1]


def test_numbers_that_are_none():
    assert math.isnan(fastjson.loads(b"NaN"))
    assert fastjson.loads(b"[-Infinity]") == [-math.inf]


def test_what_is_no_json_is_refused():
    with pytest.raises(TypeError, match="set"):
        fastjson.dumps([{1}])
    itself: list[object] = []
    itself.append(itself)
    with pytest.raises(ValueError, match="Circular"):
        fastjson.dumps(itself)
    with pytest.raises(RecursionError):
        fastjson.loads(b"[" * 100_000)


@pytest.mark.parametrize("text", ["", "{", "[1,]", "{} x", '{"a" 1}', '"a', "nul"])
def test_where_the_slow_module_was_never_loaded(text):
    """The scanner cannot raise its own exception there."""
    code = "import sys; sys.path.insert(0, sys.argv[1])\nfrom cni import fastjson\nassert 'json' not in sys.modules\n"
    code += "try: fastjson.loads(sys.argv[2].encode())\nexcept ValueError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-ISE", "-c", code, str(ROOT), text], capture_output=True, text=True, check=True
    )
    with pytest.raises(ValueError) as caught:
        json.loads(text)
    assert done.stdout == f"{caught.value}\n"
