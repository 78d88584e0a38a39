"""Questions about a connection or datagram, and what the tables say to them, step by step: plain values."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bpf.wire import Endpoint, Protocol, Reason

#: Backends whose branches are walked; of a service with more it is said how many are left out.
MOST = 256

#: Refused, and by no :class:`Reason`: the program drops before it can ask.
NO_INTERFACE = "no-interface"


class Dialler(enum.Enum):
    """Whose process begins."""

    APPLICATION = "application"
    PROBER = "prober"  #: kubelet
    HOST = "host"  #: another process of the node, or one that no program here sees


class Way(enum.Enum):
    """How it goes."""

    NONE = ""
    PLAIN = "plain"
    DIRECT = "direct"
    SELF = "self"
    PROBE = "probe"
    CAPTURED = "captured:15001"  #: by the node proxy, to another node
    CAPTURED_L7 = "captured:15002"
    DATAGRAM = "datagram"


@dataclass(frozen=True, slots=True)
class Question:
    """``source`` is the address that it comes from; ``netns`` the pod's that dials, 0 for whoever is no pod in the kernel."""

    source: str
    destination: str
    port: int
    protocol: Protocol = Protocol.TCP
    netns: int = 0
    dialler: Dialler = Dialler.APPLICATION
    #: the endpoints that l7proxy may choose of, which no table of the kernel has
    l7: Sequence[tuple[str, int]] = ()


@dataclass(slots=True)
class Step:
    """``refused`` is the reason when it ends here; ``policies`` and ``model`` are filled in by who knows them."""

    step: str
    text: str
    maps: tuple[str, ...] = ()
    refused: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    policies: tuple[str, ...] = ()
    model: str = ""
    node: str = ""


@dataclass(slots=True)
class Branch:
    """One endpoint that may be drawn."""

    address: str
    port: int
    share: float | None  #: of the draws; None where it is not the kernel that draws
    steps: list[Step] = field(default_factory=list)
    way: Way = Way.NONE
    refused: str = ""
    remote: bool = False  #: another node decides on its arrival
    splice: bool | None = None  #: None: not asked, since it does not come so far

    def add(self, step: Step) -> bool:
        """Whether it goes on."""
        self.steps.append(step)
        self.refused = step.refused
        return not step.refused


@dataclass(slots=True)
class Walk:
    """``steps`` are those before an endpoint is chosen."""

    steps: list[Step] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    service: Endpoint | None = None  #: as it was found: of a node port under no address
    left_out: int = 0
    refused: str = ""

    def add(self, step: Step) -> bool:
        self.steps.append(step)
        self.refused = step.refused
        return not step.refused


def reason_text(reason: Reason) -> str:
    return reason.name.lower().replace("_", "-")


def end_text(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def shown_step(step: Step) -> dict[str, Any]:
    """As JSON has it: what is empty is left out."""
    shown: dict[str, Any] = {"step": step.step, "text": step.text}
    for name in ("refused", "model", "node"):
        if value := getattr(step, name):
            shown[name] = value
    for name in ("maps", "policies"):
        if value := getattr(step, name):
            shown[name] = list(value)
    if step.facts:
        shown["facts"] = step.facts
    return shown


def shown_branch(branch: Branch) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "address": branch.address,
        "port": branch.port,
        "share": None if branch.share is None else round(branch.share, 6),
        "way": branch.way.value,
        "kernel": "refused" if branch.refused else "allowed",
        "reason": branch.refused,
        "remote": branch.remote,
        "steps": [shown_step(step) for step in branch.steps],
    }
    if branch.splice is not None:
        shown["splice"] = branch.splice
    return shown


def shown_walk(walk: Walk) -> dict[str, Any]:
    return {
        "steps": [shown_step(step) for step in walk.steps],
        "reason": walk.refused,
        "endpoints": [shown_branch(branch) for branch in walk.branches],
        "endpoints_left_out": walk.left_out,
    }
