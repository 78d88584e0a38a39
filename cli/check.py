"""``mycel check``: everything that somebody should know about a configuration or a running mesh, and what to do about it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cli import output, watch
from cli.http import Direct, Reader, Unreachable
from common.kubernetes import ApiError
from controlplane.model.findings import Finding, Severity
from controlplane.source import Key

#: Seconds that clients get to take a change before it is said of them that they have not.
_SETTLE = 2.0
#: Seconds between two looks at what is coming up.
_INTERVAL = 0.5
#: Admin servers that are asked at the same time.
_AT_ONCE = 16

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}

#: What the mesh does not do yet for pods that are in it; said by every check, so that nobody relies on it.
LIMITS = (
    Finding(
        Severity.INFO,
        "Mesh",
        "",
        "UDP of enrolled pods is judged by identity and not encrypted",
        "let no UDP cross a network that others can read or write",
    ),
)


def offline(folder: Path) -> list[Finding]:
    """What the controller would say of a folder of manifests; nothing has to run."""
    from controlplane import check
    from controlplane.source.folder import SUFFIXES

    if not any(path.suffix in SUFFIXES for path in folder.rglob("*")):
        message = f"holds no manifest: no file that ends with {', '.join(SUFFIXES)}"
        return [Finding(Severity.ERROR, f"Folder {folder}", "", message, "name the folder of the manifests")]
    return [*check.check(folder), *LIMITS]


def online(controllers: Sequence[str], reader: Reader | None = None) -> list[Finding]:
    """What the controllers say of their objects, and how their clients are.

    :param controllers: admin addresses of all replicas.
    :raises Unreachable: a controller does not answer, or not so that this version understands it.
    """
    reader = reader or Direct()
    found: set[Finding] = set()
    for controller in controllers:
        answer = reader.read_json(controller, "/debug/findings", who="the controller")
        try:
            found |= {decode(item) for item in answer}
        except (KeyError, TypeError, ValueError) as error:
            raise Unreachable(
                f"the controller at {controller} writes its findings in a way that this version does not know: {error!r}"
            ) from error
    fleet = _settled_fleet(controllers, reader)
    return ordered([*found, *waiting(controllers, reader), *clients(fleet, reader), *LIMITS])


def waiting(controllers: Sequence[str], reader: Reader) -> list[Finding]:
    """Policy objects that some node has not taken yet."""
    found = _waiting(controllers, reader)
    if found:
        # Clients have taken everything, as far as they say; controllers ask each other a few times a second.
        time.sleep(2 * _INTERVAL)
        found = _waiting(controllers, reader)
    return found


def _waiting(controllers: Sequence[str], reader: Reader) -> list[Finding]:
    """As the first controller says it: each judges for all. One that is older than this command does not."""
    for controller in controllers:
        try:
            rows = reader.read_json(controller, "/debug/status", who="the controller")
        except Unreachable:
            continue
        try:
            return [
                Finding(
                    Severity.WARNING,
                    _object(row),
                    "",
                    f"accepted, and not in force everywhere: waiting for {row['waiting']}",
                )
                for row in rows
                if row["state"] == "accepted"
            ]
        except (KeyError, TypeError) as error:
            raise Unreachable(
                f"the controller at {controller} writes its status in a way that this version does not know: {error!r}"
            ) from error
    return []


def _object(row: dict[str, Any]) -> str:
    """As the controller's own findings name an object. :raises KeyError: a field is missing."""
    group = str(row.get("apiVersion", "")).rpartition("/")[0]
    return str(Key(group, row["kind"], row["namespace"], row["name"]))


def until_well(look: Callable[[], list[Finding]], seconds: float) -> list[Finding]:
    """What ``look`` finds once it finds no error, or when the time is over; says on stderr what it waits for.

    :raises Unreachable: still at the end of the time.
    :raises ApiError: the API server refuses; at once when waiting would not help (4xx), else at the end of the time.
    """
    deadline = time.monotonic() + seconds
    said = ""
    while True:
        last = time.monotonic() >= deadline
        try:
            found = look()
        except (Unreachable, ApiError) as error:
            if last or (isinstance(error, ApiError) and error.status < 500):
                raise
            waits = str(error)
        else:
            errors = [finding for finding in found if finding.severity is Severity.ERROR]
            if last or not errors:
                return found
            waits = f"{errors[0].object}: {errors[0].message}"
        if waits != said:
            print(f"mycel: waiting: {waits}", file=sys.stderr, flush=True)
            said = waits
        time.sleep(_INTERVAL)


def ordered(found: Iterable[Finding]) -> list[Finding]:
    """The worst first."""
    return sorted(set(found), key=lambda f: (-f.severity, f.object, f.field, f.message))


def decode(item: dict[str, Any]) -> Finding:
    """A finding as the controller's admin server encodes it.

    :raises KeyError: a field is missing.
    :raises ValueError: a severity that is none.
    """
    severity = item["severity"]
    return Finding(
        severity=Severity[severity.upper()] if isinstance(severity, str) else Severity(severity),
        object=item["object"],
        field=item["field"],
        message=item["message"],
        action=item.get("action", ""),
        file=item.get("file", ""),
    )


def encode(finding: Finding) -> dict[str, str]:
    return {
        "severity": finding.severity.name.lower(),
        "object": finding.object,
        "field": finding.field,
        "file": finding.file,
        "message": finding.message,
        "action": finding.action,
    }


def write(found: list[Finding], *, as_json: bool) -> None:
    if as_json:
        output.write_json([encode(finding) for finding in found])
        return
    for finding in found:
        where = finding.object + (f" {finding.field}" if finding.field else "")
        output.styled(
            f"{finding.severity.name.lower()}: {where}: {finding.message}", _STYLES[finding.severity]
        )
        if finding.action:
            print(f"    to do: {finding.action}")
        if finding.file:
            print(f"    file:  {finding.file}")
    errors, warnings = (sum(f.severity is s for f in found) for s in (Severity.ERROR, Severity.WARNING))
    if errors or warnings:
        print(f"{_count(errors, 'error')}, {_count(warnings, 'warning')}")
    else:
        print("no errors")


def _settled_fleet(controllers: Sequence[str], reader: Reader) -> watch.Fleet:
    """The fleet, given a moment to take a change that has just been made."""
    deadline = time.monotonic() + _SETTLE
    while True:
        fleet = watch.fleet(controllers, reader)
        settled = len(fleet.versions) == 1 and all(client.current for client in fleet.clients)
        if settled or time.monotonic() > deadline:
            return fleet
        time.sleep(0.1)


def clients(fleet: watch.Fleet, reader: Reader) -> list[Finding]:
    """Nodes without one of the components, and clients that do not have what their controller serves."""
    found: list[Finding] = []
    by_node: dict[str, dict[str, watch.Client]] = {}
    for client in fleet.clients:
        by_node.setdefault(client.node, {})[client.component] = client
    if not by_node:
        found.append(
            Finding(
                Severity.ERROR,
                "Mesh",
                "",
                "no node is connected to the controller",
                "look at the log of mycel-agent on a node: its credential, --controller and --roots",
            )
        )
    for node, here in sorted(by_node.items()):
        for component in ("agent", "nodeproxy"):
            if component not in here:
                message = f"{component} is not connected: it goes on with what it has, and gets no changes"
                action = f"look at the log of mycel-{component} on {node}"
                found.append(Finding(Severity.ERROR, f"Node {node}", "", message, action))
        if not here.keys() & {"l7proxy", "envoy"}:
            message = "no l7proxy is connected: it goes on with what it has, and gets no changes"
            found.append(
                Finding(
                    Severity.ERROR, f"Node {node}", "", message, f"look at the log of mycel-l7proxy on {node}"
                )
            )
    # At once: where a node is gone, an admin server answers with a time limit only.
    here_all = [client for _, here in sorted(by_node.items()) for client in here.values()]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for state in pool.map(lambda client: _state(client, reader), here_all):
            found += state
    return found


def _state(client: watch.Client, reader: Reader) -> list[Finding]:
    found = []
    where = f"Node {client.node}"
    for key, reason in sorted(client.errors.items()):
        message = f"{client.component} refuses {key}: {reason}"
        action = "its last good state stays in force there; correct the object that it comes from"
        found.append(Finding(Severity.ERROR, where, "", message, action))
    if not client.current and not client.errors:
        message = f"{client.component} has not acknowledged the configuration that is being served"
        action = f"if this stays, look at the log of mycel-{client.component} on {client.node}"
        found.append(Finding(Severity.WARNING, where, "", message, action))
    if client.admin:
        try:
            reader.read_text(client.admin, "/healthz/ready", who=str(client))
        except Unreachable as error:
            action = f"look at the log of mycel-{client.component} on {client.node}"
            found.append(Finding(Severity.WARNING, where, "", str(error), action))
        else:
            found += _unattached(client, reader)
            found += _certificates(client, reader)
    return found


def _certificates(client: watch.Client, reader: Reader) -> list[Finding]:
    """Workloads of a node without a certificate that is good: their connections to other nodes wait, and are refused."""
    if client.component != "nodeproxy":
        return []
    try:
        page = reader.read_json(client.admin, "/debug/state", who=str(client))["certificates"]
        missing = sorted(about["identity"] for about in page.values() if not about["usable"])
    except (Unreachable, KeyError, TypeError, AttributeError):
        return []  # a node proxy of another version
    if not missing:
        return []
    count = _count(len(missing), "workload")
    message = (
        f"{count} without a certificate that is good, of {missing[0]} first: no connection between nodes"
    )
    action = (
        f"look at the log of mycel-nodeproxy on {client.node}, and at the controllers' for refused requests"
    )
    return [Finding(Severity.WARNING, f"Node {client.node}", "", message, action)]


def _unattached(client: watch.Client, reader: Reader) -> list[Finding]:
    """Pods that are to be in the mesh and are not captured."""
    if client.component != "agent":
        return []
    try:
        pods = reader.read_json(client.admin, "/debug/status", who=str(client))["unattached"]
    except (Unreachable, KeyError, TypeError):
        return []  # an agent of another version: this is the one thing that it cannot be asked
    message = f"is to be in the mesh and is not captured yet (node {client.node})"
    action = (
        "pods that run already join within seconds; if it stays, look at the log of mycel-agent on "
        f"{client.node}, and restart the pod"
    )
    return [Finding(Severity.WARNING, f"Pod {pod}", "", message, action) for pod in pods]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
