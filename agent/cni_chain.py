"""Our entry in a node's CNI configuration: which list the runtime uses, and how the entry gets into it and out again.

Owns the files' content and their replacement; when to look is :mod:`agent.cni_node`'s. containerd and CRI-O use the file that is
first by name among ``*.conflist``, ``*.conf`` and ``*.json`` (go-cni, ocicni). The entry is put into that file's text at the end
of ``plugins``, so that everything else stays byte for byte as its owner wrote it, and is cut out of it again the same way.

A file that holds one plugin and no list (the form before CNI 1.0) is left alone: a list of ours that wraps it is put before it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass, field
from json import decoder, scanner
from pathlib import Path
from typing import Any

from cni import protocol

#: What the runtime starts, and the ``type`` of our entry.
TYPE = "mycel"
_ENDINGS = (".conf", ".conflist", ".json")
#: Name of the list that wraps a single plugin, and the key in it that names the file.
WRAPPER = "00-mycel.conflist"
_WRAPS = "mycel.io/wraps"
_SPACE = re.compile(r"[ \t\r\n]*")


class ChainError(Exception):
    """The entry cannot be put in; nothing was changed. The message says why and what to do."""


class _Meanwhile(Exception):
    """Somebody wrote the file after we read it; the notice of that brings us back."""


@dataclass(frozen=True)
class _Member:
    """Where a value stands in the text."""

    value: Any
    begin: int
    end: int


@dataclass
class State:
    """What is in the folder. ``file`` is the list that holds the entry now; ``problem`` says why none does."""

    file: Path | None = None
    changed: list[str] = field(default_factory=list)
    problem: str = ""


def put_in(folder: Path, entry: dict[str, Any]) -> State:
    """Make the runtime's list end with ``entry``, and no other list hold one of ours. Again changes nothing.

    :raises OSError: the folder or a file cannot be read or written.
    """
    state = State()
    first = _first(folder, state)
    if first is None:
        state.problem = state.problem or f"{folder}: no network configuration yet"
        return state
    name, text = first
    try:
        if name.endswith(".conflist"):
            wanted, target = with_entry(text, entry), folder / name
        else:
            wanted, target = wrapped(text, name, entry), folder / _wrapper_before(name)
    except ChainError as error:
        # A wrapper of what cannot be wrapped any more goes: the runtime then does what it would without us.
        take_out(folder)
        state.problem = f"{folder / name}: {error}"
        return state
    try:
        if _replace(target, wanted, folder / name, text):
            state.changed.append(target.name)
    except (_Meanwhile, FileNotFoundError):
        state.problem = f"{folder / name}: is just being written"
        return state
    state.file, state.problem = target, ""
    for other in _configurations(folder):
        if other != target.name and _clean(folder / other):
            state.changed.append(other)
    return state


def take_out(folder: Path) -> list[str]:
    """Remove our entry from every list, and lists of ours; gives the files that were changed.

    :raises OSError: a file cannot be read or written.
    """
    return [name for name in _configurations(folder) if _clean(folder / name)]


def with_entry(text: str, entry: dict[str, Any]) -> str:
    """A list's text with ``entry`` as its last plugin; other entries of ours go.

    :raises ChainError: it is no list that our plugin can stand in.
    """
    config, plugins = _list(text)
    _check_version(config)
    if plugins.value and plugins.value[-1] == entry and sum(map(_ours, plugins.value)) == 1:
        return text
    text = without_entry(text)
    _, plugins = _list(text)
    elements = _elements(text, plugins)
    if not elements:
        raise ChainError("plugins is empty: there is no interface to chain behind")
    last = elements[-1]
    # The space before the last element (its indentation) stands before ours too.
    lead = text[elements[-2].end + 1 if len(elements) > 1 else plugins.begin + 1 : last.begin]
    return text[: last.end] + "," + lead + _dump(entry, lead) + text[last.end :]


def without_entry(text: str) -> str:
    """A list's text without entries of ours.

    :raises ChainError: it is no list.
    """
    while True:
        _, plugins = _list(text)
        elements = _elements(text, plugins)
        at = next((n for n, element in enumerate(elements) if _ours(element.value)), None)
        if at is None:
            return text
        if at > 0:
            begin, end = elements[at - 1].end, elements[at].end
        elif len(elements) > 1:
            begin, end = elements[0].begin, elements[1].begin
        else:
            begin, end = plugins.begin + 1, plugins.end - 1
        text = text[:begin] + text[end:]


def wrapped(text: str, name: str, entry: dict[str, Any]) -> str:
    """A list of ours with the one plugin that the file ``name`` configures.

    :raises ChainError: our plugin cannot stand in such a list.
    """
    config = _object(text)
    if not isinstance(config.get("type"), str) or not config["type"]:
        raise ChainError("type is missing: it names no plugin")
    _check_version(config)
    if config["type"] == TYPE:
        raise ChainError(
            f"{TYPE} is the only plugin: it has to be chained behind one that makes the interface"
        )
    plugin = {key: value for key, value in config.items() if key not in ("cniVersion", "name")}
    whole = {
        "cniVersion": config["cniVersion"],
        "name": config.get("name", ""),
        _WRAPS: name,
        "plugins": [plugin, entry],
    }
    return json.dumps(whole, indent=2) + "\n"


def _first(folder: Path, state: State) -> tuple[str, str] | None:
    """The file that the runtime uses without us, and its text. What cannot be read as configuration is passed over."""
    for name in _configurations(folder):
        try:
            text = (folder / name).read_text()
            config = _object(text)
            if _WRAPS in config:
                continue
            if name.endswith(".conflist"):
                _list(text)
        except FileNotFoundError:
            continue
        except (ChainError, UnicodeDecodeError) as error:
            # containerd stops here, CRI-O goes on; somebody may be in the middle of writing it.
            state.problem = state.problem or f"{folder / name}: {error}"
            continue
        return name, text
    return None


def _configurations(folder: Path) -> list[str]:
    return sorted(
        n for n in os.listdir(folder) if os.path.splitext(n)[1] in _ENDINGS and not (folder / n).is_dir()
    )


def _clean(file: Path) -> bool:
    try:
        text = file.read_text()
        config = _object(text)
        if _WRAPS in config:
            file.unlink()
            return True
        if not file.name.endswith(".conflist"):
            return False
        return _replace(file, without_entry(text), file, text)
    except (ChainError, _Meanwhile, UnicodeDecodeError, FileNotFoundError):
        return False


def _wrapper_before(name: str) -> str:
    """A name that is before ``name`` in the runtime's order.

    :raises ChainError: none of ours is.
    """
    for own in (WRAPPER, f"-{WRAPPER}", f"!{WRAPPER}"):
        if own < name:
            return own
    raise ChainError(f"its name is before {WRAPPER}: rename it, or write a .conflist")


def _check_version(config: dict[str, Any]) -> None:
    """:raises ChainError: the runtime would call our plugin with a version that it does not know."""
    given = [config.get("cniVersion", "0.1.0")]
    several = config.get("cniVersions")
    if isinstance(several, list):
        given += several
    try:
        # Of several the runtime takes the highest.
        chosen = max(given, key=lambda version: tuple(int(part) for part in version.split(".")))
    except (AttributeError, ValueError):
        raise ChainError(f"cniVersion {given!r} is no version") from None
    if chosen not in protocol.SUPPORTED:
        raise ChainError(f"cniVersion {chosen} is not supported; supported: {', '.join(protocol.SUPPORTED)}")


def _ours(plugin: object) -> bool:
    return isinstance(plugin, dict) and plugin.get("type") == TYPE


def _object(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ChainError(f"no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ChainError("no JSON object")
    return config


def _list(text: str) -> tuple[dict[str, Any], _Member]:
    """The whole, and where its array of plugins stands."""
    config = _object(text)
    name = config.get("name")
    if not isinstance(name, str) or not name:
        raise ChainError("name is missing or no text")
    plugins = config.get("plugins")
    if not isinstance(plugins, list):
        raise ChainError("plugins is missing or no list")
    for index, plugin in enumerate(plugins):
        if not isinstance(plugin, dict) or not isinstance(plugin.get("type"), str) or not plugin["type"]:
            raise ChainError(f"plugins[{index}].type is missing or no text")
    return config, _members(text)["plugins"]


_scan = scanner.py_make_scanner(decoder.JSONDecoder())  # type: ignore[attr-defined]


def _members(text: str) -> dict[str, _Member]:
    """The members of the JSON object in ``text``, which is valid. Of a key that stands twice the last holds."""
    found = {}
    at = _skip(text, _skip(text, 0) + 1)
    while text[at] != "}":
        key, at = decoder.scanstring(text, at + 1)  # type: ignore[attr-defined]
        begin = _skip(text, _skip(text, at) + 1)
        value, end = _scan(text, begin)
        found[key] = _Member(value, begin, end)
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def _elements(text: str, array: _Member) -> list[_Member]:
    found = []
    at = _skip(text, array.begin + 1)
    while text[at] != "]":
        value, end = _scan(text, at)
        found.append(_Member(value, at, end))
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _dump(entry: dict[str, Any], lead: str) -> str:
    """In the manner of the text around it: on lines of its own if the others are, else on one line."""
    if "\n" not in lead:
        return json.dumps(entry)
    indent = lead.rpartition("\n")[2]
    return json.dumps(entry, indent="\t" if "\t" in indent else 2).replace("\n", f"\n{indent}")


def _replace(target: Path, text: str, source: Path, before: str) -> bool:
    """Give ``target`` a new content by rename; False if it has it already.

    The name aside has none of the endings that a runtime looks for.

    :raises _Meanwhile: ``source`` is not what it was when we read it.
    """
    try:
        current: str | None = target.read_text()
    except FileNotFoundError:
        current = None
    if current == text:
        return False
    mode = stat.S_IMODE(source.stat().st_mode)
    owner = source.stat()
    aside = target.with_name(f".{target.name}.{TYPE}-{os.getpid()}")
    try:
        with aside.open("w") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        aside.chmod(mode)
        os.chown(aside, owner.st_uid, owner.st_gid)
        if source.read_text() != before:
            raise _Meanwhile
        aside.rename(target)
    finally:
        aside.unlink(missing_ok=True)
    return True
