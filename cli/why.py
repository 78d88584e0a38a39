"""``mycel why``: asks the agents of both ends, puts their answers together, and writes them step by step.

Owns what is asked of whom, the verdict of the whole way, and how it looks. The kernel's side is what the agents read in its maps
(:mod:`agent.debug_why`), or here from the pins.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli import output
from cli.agents import Agents, BadQuestion
from cli.http import Unreachable

Json = dict[str, Any]

#: Seconds after which a difference is looked at again: tables and model change one after the other.
_SETTLE = 1.0
#: Endpoints that other nodes are asked about.
_MOST_REMOTE = 64
#: Endpoints that are shown step by step.
_SHOWN = 8

_STEP = 14  # columns


def split_destination(text: str) -> tuple[str, str]:
    """HOST and PORT of DST:PORT.

    :raises ValueError: there is no port, or an IPv6 address without brackets.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port:
        raise ValueError(f"destination {text}: there is no port; say {text.rstrip(':') or 'DST'}:PORT")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"destination {text}: an IPv6 address stands in brackets: [{host}]:{port}")
    return host.strip("[]"), port


def ask(agents: Agents, source: str, destination: str, *, protocol: str, node: str | None) -> Json:
    """The whole answer, with ``verdict``.

    :raises ValueError: the destination is none.
    :raises BadQuestion: an agent cannot answer that.
    :raises Unreachable: the agent of the source's node does not answer.
    """
    host, port = split_destination(destination)
    question = {
        "source": source,
        "destination": host,
        "port": port,
        "protocol": protocol,
        "node": node or "",
    }
    answer = _whole(agents, question, node)
    if answer["differences"]:
        # An update on its way is no difference.
        time.sleep(_SETTLE)
        before, answer = set(answer["differences"]), _whole(agents, question, node)
        answer["differences"] = [text for text in answer["differences"] if text in before]
    return answer


def _whole(agents: Agents, question: Mapping[str, str], node: str | None) -> Json:
    asked = agents.of(node) if node else agents.all()[0]
    answer: Json = agents.ask(asked, "/debug/why", question)
    if elsewhere := answer.get("elsewhere"):
        asked = agents.of(elsewhere)
        answer = agents.ask(asked, "/debug/why", {**question, "node": elsewhere})
        if answer.get("elsewhere"):
            raise BadQuestion(
                f"source {question['source']}: node {elsewhere} says it is on {answer['elsewhere']}; "
                "their agents do not have the same configuration yet"
            )
    for number, endpoint in enumerate([e for e in answer["endpoints"] if e["remote"] and not e["reason"]]):
        if number >= _MOST_REMOTE:
            endpoint["unknown"] = f"only {_MOST_REMOTE} endpoints of other nodes are asked about"
            continue
        _arrives(agents, answer, endpoint)
    answer["verdict"] = verdict(answer)
    return answer


def _arrives(agents: Agents, answer: Json, endpoint: Json) -> None:
    """What the endpoint's own node says."""
    where = endpoint.get("node", "")
    question = {
        "source": answer["source"]["address"],
        "destination": endpoint["address"],
        "port": str(endpoint["port"]),
        "protocol": answer["destination"]["protocol"].lower(),
        "arrival": "hbone" if endpoint["way"].startswith("captured") else "plain",
    }
    try:
        there = agents.ask(agents.of(where), "/debug/why", question)
    except (Unreachable, BadQuestion) as error:
        endpoint["unknown"] = f"its node is not asked: {error}" if where else "its node is not known"
        return
    (found,) = there["endpoints"]
    for step in found["steps"]:
        endpoint["steps"].append({**step, "node": where})
    endpoint["kernel"], endpoint["reason"] = found["kernel"], found["reason"]
    if found["model"] == "refused":
        endpoint["model"] = "refused"
    endpoint["policies"] = list(dict.fromkeys([*endpoint["policies"], *found["policies"]]))
    answer["differences"] += [
        f"node {where}: {text}" for text in there["differences"] if text not in answer["differences"]
    ]


def verdict(answer: Mapping[str, Any]) -> str:
    """``allowed``, ``refused``, ``depends`` (on the endpoint), or ``unknown``."""
    if answer["reason"]:
        return "refused"
    found = {"unknown" if "unknown" in one else one["kernel"] for one in answer["endpoints"]}
    if answer["endpoints_left_out"]:
        found.add("unknown")
    if not answer["endpoints"]:
        # An L7 service whose endpoints nobody knows here.
        return "unknown"
    if found == {"allowed"}:
        return "allowed"
    if found == {"refused"}:
        return "refused"
    return "depends" if "unknown" not in found or "refused" in found else "unknown"


def from_pins(pins: Path, source: str, destination: str, *, protocol: str) -> Json:
    """By the maps of this node alone, without names and policies; addresses only.

    :raises ValueError: an address is none.
    :raises KernelError: the pins are not there.
    """
    import ipaddress

    from agent.kernel.steps import Dialler, Question, shown_walk
    from agent.kernel.tables import Tables
    from agent.kernel.walk import Walker
    from bpf import wire

    host, port = split_destination(destination)
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(
            f"port {port}: not a number from 1 to 65535, and without an agent no port has a name"
        )
    ends = {}
    for name, text in (("source", source), ("destination", host)):
        if text in ("kubelet", "host"):
            raise ValueError(f"{name} {text}: without an agent only addresses are known")
        try:
            ends[name] = wire.canonical(str(ipaddress.ip_address(text)))
        except ValueError:
            raise ValueError(
                f"{name} {text}: no address; without an agent only addresses are known"
            ) from None
    with Tables.open(pins) as tables:
        netns = next(
            (n for n, pod in tables.pods().items() if ends["source"] in (pod.address4, pod.address6)), 0
        )
        if not netns and (":" in ends["source"]) is not (":" in ends["destination"]):
            raise ValueError(f"source {source}: is of another family than {host}")
        question = Question(
            ends["source"],
            ends["destination"],
            int(port),
            wire.Protocol[protocol.upper()],
            netns,
            Dialler.APPLICATION,
        )
        walk = Walker(tables).walk(question)
    shown = shown_walk(walk)
    for endpoint in shown["endpoints"]:
        if endpoint["remote"] and not endpoint["reason"]:
            endpoint["unknown"] = "its node decides; run this there"
    answer: Json = {
        "node": "",
        "source": {"text": source, "address": ends["source"], "netns": netns},
        "destination": {
            "text": host,
            "address": ends["destination"],
            "port": int(port),
            "protocol": protocol.upper(),
        },
        **shown,
        "differences": [],
    }
    answer["verdict"] = verdict(answer)
    return answer


# How it looks


def write(answer: Json) -> None:
    """As text."""
    _ends(answer)
    print()
    for step in answer["steps"]:
        _step(step)
    endpoints = answer["endpoints"]
    # Those that are refused first: they are why somebody asks.
    ordered = sorted(endpoints, key=lambda e: e["kernel"] != "refused" and "unknown" not in e)
    for endpoint in ordered[:_SHOWN]:
        print()
        _endpoint(endpoint, alone=len(endpoints) == 1)
    rest = ordered[_SHOWN:]
    if rest:
        refused = sum(one["kernel"] == "refused" for one in rest)
        print(f"\n{len(rest)} more endpoints, {refused} of them refused: -o json has all")
    if left_out := answer.get("endpoints_left_out"):
        output.styled(f"\nNOT KNOWN: {left_out} more endpoints are not looked at", "yellow")
    print()
    _verdict(answer)
    for text in answer["differences"]:
        output.styled(f"  DIFFERS: {text}", "bold red")


def _ends(answer: Json) -> None:
    source, destination = answer["source"], answer["destination"]
    said = source.get("pod") or source["text"]
    if source["address"] and source["address"] != said:
        said += f" ({source['address']})"
    if source.get("node"):
        said += f" on {source['node']}"
    if source.get("identity"):
        said += f", {source['identity']}" + ("" if source["in_mesh"] else ", not in the mesh")
    print(f"from  {said}")
    to = destination.get("service") or destination.get("pod") or destination["text"]
    end = f"[{destination['address']}]" if ":" in destination["address"] else destination["address"]
    end += f":{destination['port']}/{destination['protocol']}"
    print(f"to    {to} ({end})" if to != destination["address"] else f"to    {end}")


def _step(step: Json, indent: str = "") -> None:
    text = step["text"]
    if step.get("node"):
        text = f"{step['node']}: {text}"
    if step.get("maps"):
        text += f"  [{', '.join(step['maps'])}]"
    line = f"{indent}{step['step'].ljust(_STEP)}{text}"
    if step.get("refused"):
        output.styled(f"{line}  REFUSED: {step['refused']}", "red")
    else:
        print(line)
    if step.get("policies") or step.get("model", "").startswith("refused"):
        print(f"{indent}{' ' * _STEP}policies: {step['model']}")


def _endpoint(endpoint: Json, *, alone: bool) -> None:
    address = f"[{endpoint['address']}]" if ":" in endpoint["address"] else endpoint["address"]
    line = f"{address}:{endpoint['port']}"
    if endpoint.get("pod"):
        line += f"  {endpoint['pod']}"
    if endpoint.get("node"):
        line += f" on {endpoint['node']}"
    if endpoint["share"] is not None and not alone:
        line += f"  {endpoint['share']:.1%}"
    output.styled(line, "bold")
    for step in endpoint["steps"]:
        _step(step, "  ")
    if "unknown" in endpoint:
        output.styled(f"  NOT KNOWN: {endpoint['unknown']}", "yellow")
    elif not alone:
        _word(endpoint["kernel"], "  ", endpoint["reason"])


def _word(word: str, indent: str, reason: str = "") -> None:
    style = {"allowed": "green", "refused": "red"}.get(word, "yellow")
    output.styled(f"{indent}{word.upper()}{f': {reason}' if reason else ''}", style)


def _verdict(answer: Json) -> None:
    endpoints = answer["endpoints"]
    reasons = (
        [answer["reason"]] if answer["reason"] else sorted({e["reason"] for e in endpoints if e["reason"]})
    )
    word: str = answer["verdict"]
    said = {
        "allowed": "ALLOWED",
        "refused": "REFUSED",
        "depends": "DEPENDS ON THE ENDPOINT",
        "unknown": "NOT KNOWN",
    }[word]
    line = f"{said}: {', '.join(reasons)}" if reasons else said
    ways = sorted({one["way"] for one in endpoints if one["way"] and not one["reason"]})
    if ways:
        line += f" ({', '.join(ways)})"
    policies = sorted({name for one in endpoints for name in one.get("policies", ())})
    if policies:
        line += f" by {', '.join(policies)}"
    output.styled(line, {"allowed": "bold green", "refused": "bold red"}.get(word, "bold yellow"))
    if answer["differences"]:
        output.styled(
            "THE KERNEL AND THE POLICIES DIFFER: what the kernel says above is what happens; "
            "the agent's log, and mycel agent status, say whether it repairs it",
            "bold white on red",
        )


def status(answer: Json) -> int:
    """The exit status: 0 allowed, 1 refused somewhere or different, 2 not known."""
    if answer["verdict"] == "unknown":
        return 2
    return 0 if answer["verdict"] == "allowed" and not answer["differences"] else 1
