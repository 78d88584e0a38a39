"""``mycel bpf``: what the kernel of each node has: its maps, accounts and verdicts, as tables.

Owns how pages of agents (or, with ``--pins``, the maps of this machine) become rows. JSON is what the pages say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cli import output

Json = dict[str, Any]
#: By node, what its page says.
Answers = Iterable[tuple[str, Any]]


def write_maps(answers: Answers) -> None:
    headers = ("NODE", "MAP", "TYPE", "ENTRIES", "SIZE", "FULL", "REFUSED", "MEMORY")
    rows = []
    for node, found in answers:
        for one in found:
            used = one["entries"]
            share = f"{used / one['size']:.0%}" if used is not None and one["size"] else "-"
            refused = one.get("refused")
            rows.append(
                (
                    node,
                    one["name"],
                    one["type"],
                    "-" if used is None else str(used),
                    str(one["size"]) if one["size"] else "-",
                    share,
                    "-" if refused is None else str(refused + one.get("over_share", 0)),
                    _bytes(one["memory_bytes"]),
                )
            )
    output.write_table(headers, rows, right=frozenset({3, 4, 5, 6, 7}))


def write_elements(answers: Answers) -> None:
    rows = []
    for node, found in answers:
        for one in found:
            rows.append((node, _flat(one["key"]), _flat(one["value"])))
    output.write_table(("NODE", "KEY", "VALUE"), rows)


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={one}" for name, one in value.items())
    return "-" if value is None else str(value)


def write_flows(answers: Answers) -> None:
    """Records of connections that ended or were refused."""
    headers = (
        "ENDED",
        "NODE",
        "VERDICT",
        "PROTOCOL",
        "CLIENT",
        "SERVER",
        "SOURCE",
        "DESTINATION",
        "SENT",
        "RECEIVED",
    )
    rows = []
    for node, found in answers:
        for one in found:
            verdict = one["verdict"] + (f": {one['reason']}" if one["reason"] else "")
            rows.append(
                (
                    one["ended"].partition(".")[0].replace("T", " "),
                    node,
                    verdict,
                    one["protocol"],
                    one["client"],
                    one["server"],
                    one["source"],
                    one["destination"],
                    str(one["sent"]),
                    str(one["received"]),
                )
            )
    output.write_table(headers, sorted(rows, reverse=True), right=frozenset({8, 9}))


def write_sums(answers: Answers) -> None:
    """Sums by identities, port, direction and verdict."""
    headers = (
        "NODE",
        "SOURCE",
        "DESTINATION",
        "PROTOCOL",
        "PORT",
        "DIRECTION",
        "VERDICT",
        "OPEN",
        "TOTAL",
        "SENT",
        "RECEIVED",
    )
    rows = []
    for node, found in answers:
        for one in found:
            verdict = one["verdict"] + (f": {one['reason']}" if one["reason"] else "")
            opened, closed = one.get("opened", 0), one.get("closed", 0)
            total = one.get("refused", one.get("count", 0)) or opened
            rows.append(
                (
                    node,
                    one["source"],
                    one["destination"],
                    one["protocol"],
                    str(one["port"]),
                    one["direction"],
                    verdict,
                    str(opened - closed),
                    str(total),
                    str(one.get("sent", 0)),
                    str(one.get("received", 0)),
                )
            )
    output.write_table(headers, sorted(rows), right=frozenset({4, 7, 8, 9, 10}))


def write_policies(answers: Answers) -> None:
    """Each pod's verdicts, one line for each entry."""
    first = True
    for node, found in answers:
        for pod in found:
            if not first:
                print()
            first = False
            _policy(node, pod)
    if first:
        print("no pod in the mesh")


def _policy(node: str, pod: Json) -> None:
    name = pod["pod"] or f"namespace {pod['netns']}"
    line = f"{name} ({', '.join(pod['addresses'])})" + (f" on {node}" if node else "")
    if pod.get("mtls"):
        line += f", mTLS {pod['mtls']}"
    output.styled(line, "bold")
    if selected := pod.get("selected_by"):
        print(f"  AuthorizationPolicy {', '.join(selected)}")
    entries = pod["authorization"]
    if entries is None:
        output.styled("  no table of verdicts: everything is refused", "red")
    else:
        print(f"  generation {pod['generation']}; who has no entry is refused")
        output.write_table(
            ("  SOURCE", "IDENTITY", "ADDRESSES", "PORT", "VERDICT"),
            [
                (
                    f"  {one['source']}",
                    str(one["identity"]),
                    ",".join(one["addresses"]) or "any other",
                    str(one["port"] or "any other"),
                    "ALLOW" if one["allowed"] else "DENY",
                )
                for one in entries
            ],
        )
    if names := pod.get("network_policies"):
        print(f"  NetworkPolicy {', '.join(names)}")
    for direction, classes in pod["network"].items():
        output.write_table(
            (f"  {direction.upper()}", "ALLOWED"),
            [
                (
                    # Class 0 has everybody else too, whoever is in it by name.
                    "  " + ",".join(one["addresses"] if one["class"] else [*one["addresses"], "any other"]),
                    ", ".join(one["allowed"]) or "nothing",
                )
                for one in classes
            ],
        )


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


# Straight from the pins


def _number(identity: int) -> str:
    return {0: "plain text", 1: "a probe", 2: "the node proxy", 3: "any workload"}.get(
        identity, f"identity {identity}"
    )


def pinned_maps(pins: Path) -> list[Json]:
    from agent.kernel import dump

    return dump.sizes(pins)


def pinned_elements(pins: Path, name: str, most: int) -> list[Json]:
    from agent.kernel import dump

    return dump.elements(pins, name, most)


def pinned_sums(pins: Path) -> list[Json]:
    from agent.kernel import dump

    return dump.sums(pins, _number)


def pinned_policies(pins: Path, pod: str | None) -> list[Json]:
    """:raises LookupError: there is no such pod."""
    from agent.kernel import dump

    only = dump.pod_of(pins, pod)[0] if pod is not None else None
    return [
        {"pod": "", "addresses": list(filter(None, (one.address4, one.address6))), **verdicts}
        for netns, (one, verdicts) in dump.all_verdicts(pins, _number).items()
        if only in (None, netns)
    ]
