"""``mycel agent status``: how each node's agent and its kernel are.

Owns what counts as wrong there, in words. What an agent says of itself is its page ``/debug/status``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cli import output

Json = dict[str, Any]

_HEADERS = (
    "NODE",
    "CONTROLLER",
    "CONFIGURATION",
    "PODS",
    "IN MESH",
    "PROXIES",
    "SPLICE",
    "FULLEST MAP",
    "REPAIRS",
)
_VERSION = 12  # characters of a snapshot's version
#: How full a map is when it is told of: where the agent's own alarm becomes an error.
_FULL = 0.95


def problems(status: Json) -> list[str]:
    """What is wrong with a node, by its agent's word."""
    found = []
    if status["problem"]:
        found.append(status["problem"])
    controller = status["controller"]
    if not controller["connected"]:
        why = f": {controller['problem']}" if controller["problem"] else ""
        found.append(f"no controller is connected{why}; the last good configuration is in force")
    found += [f"no {role} is connected" for role, count in sorted(status["proxies"].items()) if not count]
    for link in status.get("detached_links", ()):
        found.append(f"{link} is not attached to the node's cgroup: what it decides is not decided")
    for pod in status["unattached"]:
        found.append(f"pod {pod} is to be in the mesh and is not captured")
    fullest = status.get("fullest")
    if fullest and fullest["size"] and fullest["entries"] >= _FULL * fullest["size"]:
        found.append(f"map {fullest['name']} fills up: {fullest['entries']} of {fullest['size']}")
    return found


def write(answers: Iterable[tuple[str, Json]]) -> None:
    answers = list(answers)
    output.write_table(_HEADERS, [_row(status) for _, status in answers], right=frozenset({3, 4}))
    for node, status in answers:
        for text in problems(status):
            output.styled(f"{node}: {text}", "red")
        refusals = status.get("refusals")
        if refusals:
            said = ", ".join(f"{reason} {count}" for reason, count in sorted(refusals.items()))
            print(f"{node}: refused in the kernel so far: {said}")


def _row(status: Json) -> tuple[str, ...]:
    splice, fullest = status.get("splice"), status.get("fullest")
    if splice is None:
        spliced = "?"
    elif not splice["supported"]:
        spliced = "unsupported"
    else:
        spliced = f"on, {splice['entered']} entered" if splice["on"] else "off"
    return (
        status["node"],
        "connected" if status["controller"]["connected"] else "AWAY",
        status["version"][:_VERSION] or "none",
        str(status.get("attached", "?")),
        str(status.get("enrolled", "?")),
        ", ".join(role for role, count in sorted(status["proxies"].items()) if count) or "none",
        spliced,
        f"{fullest['name']} {fullest['entries'] / fullest['size']:.0%}" if fullest else "?",
        str(sum(status.get("repairs", {}).values())),
    )
