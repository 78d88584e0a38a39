"""JSON (RFC 8259) by the C parts of the interpreter's own ``json`` alone.

That module's regular expressions take half of the plugin's start, for white space and numbers that the C scanner reads itself.
Reads and writes what ``json.loads`` and ``json.dumps`` do (a test compares them), from bytes in UTF-8 and to text in ASCII.
"""

from __future__ import annotations

import _json

TYPE_CHECKING = False  # typing itself is not imported: 3 ms
if TYPE_CHECKING:
    from typing import Any

_SPACE = " \t\n\r"
_CONSTANTS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


class _Settings:
    """Of the C scanner, as ``json.JSONDecoder`` has them."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = _CONSTANTS.__getitem__


_scan: Any = _json.make_scanner(_Settings)  # type: ignore[arg-type]


def loads(data: bytes) -> Any:
    """The value of one text.

    :raises ValueError: no JSON, or not in UTF-8; what is wrong and where is in the message.
    :raises RecursionError: nested too deeply.
    """
    text = data.decode().removeprefix("\ufeff").strip(_SPACE)
    try:
        value, end = _scan(text, 0)
        if end == len(text):
            return value
    except (StopIteration, SystemError):
        # The latter is how the scanner fails to raise an exception of a module that was never loaded.
        pass
    # What is no JSON may take its time: the words for it are there.
    import json

    return json.loads(text)


def dumps(value: Any) -> str:
    """The text of a value of dictionaries, lists and simple values.

    :raises TypeError: it has others.
    :raises ValueError: it contains itself.
    """
    if isinstance(value, str):
        return _json.encode_basestring_ascii(value)
    return "".join(_encode(value, 0))


def _refuse(value: object) -> Any:
    raise TypeError(f"a {type(value).__name__} is no JSON")


# In the order of the C type: markers (against cycles), default, encoder, indent, separators, sort_keys, skipkeys, allow_nan.
def _encode(value: Any, level: int) -> Any:
    return _json.make_encoder(
        {}, _refuse, _json.encode_basestring_ascii, None, ": ", ", ", False, False, True
    )(value, level)
