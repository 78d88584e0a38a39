"""Finds the processes that measure, scrapes them twice, and writes what :mod:`cli.stat` makes of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cli import output
from cli.http import Direct, Reader, Unreachable
from cli.metrics import Scrape
from cli.stat import HEADERS, PLACES, RIGHT, ServiceStat, services


@dataclass(frozen=True, slots=True)
class Client:
    """A process that the controller serves. ``admin`` is where it serves its metrics, ``HOST:PORT``; empty if unknown."""

    component: str
    node: str
    admin: str
    acked: str  #: the snapshot that it has in force
    errors: dict[str, str]  #: what it refused: resource to reason
    served: str = ""  #: the snapshot that its controller serves

    @property
    def current(self) -> bool:
        """Whether it has in force what its controller serves."""
        return self.acked == self.served

    def __str__(self) -> str:
        return f"{self.component} on {self.node}"


@dataclass(frozen=True, slots=True)
class Fleet:
    """Who is connected to the controllers, and the versions of the snapshots that they serve (one, once they agree)."""

    versions: frozenset[str]
    clients: list[Client]


@dataclass(frozen=True, slots=True)
class Measured:
    seconds: float
    services: list[ServiceStat]
    #: processes that did not answer: their share is missing from the figures
    missing: list[str]


def fleet(controllers: Sequence[str], reader: Reader) -> Fleet:
    """Who is connected to any of the controllers.

    :param controllers: their admin addresses.
    :raises Unreachable: one of them does not answer, or not so that this version understands it.
    """
    versions: set[str] = set()
    clients: list[Client] = []
    for controller in controllers:
        answer = reader.read_json(controller, "/debug/clients", who="the controller")
        try:
            version = answer["version"]
            versions.add(version)
            clients += [
                Client(c["component"], c["node"], c["admin"], c["version_acked"], dict(c["errors"]), version)
                for c in answer["clients"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise Unreachable(
                f"the controller at {controller} describes its clients in a way that this version does not know: {error!r}"
            ) from error
    return Fleet(frozenset(versions), clients)


def measure(controllers: Sequence[str], interval: float, reader: Reader | None = None) -> Measured:
    """Scrape every process twice, ``interval`` seconds apart.

    :raises Unreachable: the controller does not answer, nobody is connected to it, or none of the clients answers.
    """
    reader = reader or Direct()
    found = [client for client in fleet(controllers, reader).clients if client.component in PLACES]
    if not found:
        raise Unreachable(
            f"no agent or proxy is connected to the controller at {', '.join(controllers)}: nothing is measured yet"
        )
    targets = [client for client in found if client.admin]
    missing = [f"{client} has not said where it serves its metrics" for client in found if not client.admin]
    before, _, began = _scrape(targets, reader)
    time.sleep(interval)
    after, failed, ended = _scrape(targets, reader)
    if not after:
        raise Unreachable("; ".join([*missing, *failed]))
    # A process that answered only the second time would count its whole life as the interval's.
    after = {address: scrape for address, scrape in after.items() if address in before}
    components = {client.admin: client.component for client in targets}
    seconds = ended - began
    owners = _owners(controllers[0], reader)
    return Measured(seconds, services(before, after, components, seconds, owners), missing + failed)


def write(measured: Measured, *, as_json: bool) -> None:
    if as_json:
        output.write_json(
            {
                "seconds": measured.seconds,
                "services": [stat.json() for stat in measured.services],
                "missing": measured.missing,
            }
        )
        return
    if measured.services:
        output.write_table(HEADERS, [stat.cells() for stat in measured.services], right=RIGHT)
    else:
        print(f"no traffic in {measured.seconds:.1f} s")
    for text in measured.missing:
        output.fail(f"not counted: {text}")


def _owners(controller: str, reader: Reader) -> dict[tuple[str, str], str]:
    """The one service of each workload, as the controller's snapshot has it; workloads of several services are left out."""
    resources = reader.read_json(controller, "/debug/snapshot", who="the controller")["resources"]
    workloads = {r["uid"]: (r["namespace"], r["workload_name"]) for r in resources if r["type"] == "workload"}
    names: dict[tuple[str, str], set[str]] = {}
    for service in (r for r in resources if r["type"] == "service"):
        for port in service["ports"]:
            for endpoint in port["endpoints"]:
                if endpoint["uid"]:  # others are no pods
                    names.setdefault(workloads[endpoint["uid"]], set()).add(service["name"])
    return {workload: next(iter(found)) for workload, found in names.items() if len(found) == 1}


def _scrape(targets: Iterable[Client], reader: Reader) -> tuple[dict[str, Scrape], list[str], float]:
    """What each answers by its address, who did not, and when (the middle of the scrape, monotonic seconds)."""
    targets = list(targets)
    found: dict[str, Scrape] = {}
    failed: list[str] = []
    began = time.monotonic()
    with ThreadPoolExecutor(max_workers=max(1, min(32, len(targets)))) as pool:
        futures = [(client, pool.submit(_read, client, reader)) for client in targets]
        for client, future in futures:
            try:
                found[client.admin] = future.result()
            except Unreachable as error:
                failed.append(str(error))
    return found, failed, (began + time.monotonic()) / 2


def _read(client: Client, reader: Reader) -> Scrape:
    text = reader.read_text(client.admin, "/metrics", who=str(client))
    try:
        return Scrape.parse(text)
    except ValueError as error:
        raise Unreachable(
            f"{client} at {client.admin} serves no metrics that can be read: {error}"
        ) from error
