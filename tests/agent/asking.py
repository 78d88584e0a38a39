"""Questions to ``/debug/why`` over real maps, and what stands in the answers."""

from __future__ import annotations

from typing import Any

from agent.debug_why import Why
from agent.kernel.tables import Tables
from tests.agent.kernel_tables import HOST, Node
from tests.agent.shop import PORT


def ask(node: Node, /, source: str, destination: str, port: int | str = PORT, **more: str) -> dict[str, Any]:
    why = Why(node, lambda: Tables(node.kernel.maps), lambda: frozenset({HOST, "127.0.0.1"}))
    return why.page({"source": source, "destination": destination, "port": str(port), **more})


def verdicts(answer: dict[str, Any]) -> dict[str, str]:
    """By endpoint: ``allowed``, or the reason."""
    return {e["address"]: e["reason"] or "allowed" for e in answer["endpoints"]}


def step(answer: dict[str, Any], name: str, endpoint: int = 0) -> dict[str, Any]:
    steps = [*answer["steps"], *answer["endpoints"][endpoint]["steps"]]
    found: list[dict[str, Any]] = [one for one in steps if one["step"] == name]
    assert found, f"no step {name} in {[one['step'] for one in steps]}"
    return found[-1]
