"""What is measured: the paths, what each is compared with, and the order of runs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.loads import Load
from bench.wrk import Run

CLIENTS = (1, 32, 256)
ROUNDS = 9
#: Seconds of one run. A path is measured ROUNDS times for each number of clients.
SECONDS = 2

SAME_NODE = "same-node"
CROSS_NODE = "cross-node"


@dataclass(frozen=True, slots=True)
class Path:
    """One way from client to server.

    ``against`` names the paths it is compared with; of ``no-mesh`` there is one for each topology, and a path is compared
    with the one of its own.
    """

    name: str
    topology: str
    against: tuple[str, ...] = ()
    mesh: bool = False
    #: A reference that is no row of its own in the report's list.
    reference: bool = False
    load: Load = Load.REQUESTS
    #: Numbers of connections; none are those of the whole run.
    clients: tuple[int, ...] = ()

    @property
    def unit(self) -> str:
        """What of a run is compared."""
        return "gbit_per_second" if self.load is Load.BULK else "requests_per_second"


NO_MESH = "no-mesh"

#: How paths of other loads than requests are called.
LOADED = {
    Load.CONNECTIONS: "l4-new-connections",
    Load.BULK: "bulk",
    Load.LARGE: "large-responses",
}

PATHS = {
    path.name: path
    for path in (
        Path(NO_MESH, SAME_NODE),
        Path("no-mesh-cross-node", CROSS_NODE, reference=True),
        Path("same-node-l4", SAME_NODE, (NO_MESH,), mesh=True),
        Path("same-node-l7", SAME_NODE, (NO_MESH, "envoy-http-hop"), mesh=True),
        Path(
            "cross-node-l4", CROSS_NODE, (NO_MESH, "envoy-mtls-tcp-pair", "envoy-mtls-http-pair"), mesh=True
        ),
        Path("envoy-http-hop", SAME_NODE, (NO_MESH,)),
        Path("envoy-mtls-tcp-pair", CROSS_NODE, (NO_MESH,)),
        Path("envoy-mtls-http-pair", CROSS_NODE, (NO_MESH,)),
        *(
            path
            for load, name, clients in (
                (Load.CONNECTIONS, "new-connections", (32,)),
                (Load.BULK, "bulk", (1, 8)),
                (Load.LARGE, "large-responses", (8,)),
            )
            for path in (
                Path(f"no-mesh-{name}", SAME_NODE, reference=True, load=load, clients=clients),
                Path(
                    f"same-node-{LOADED[load]}", SAME_NODE, (NO_MESH,), mesh=True, load=load, clients=clients
                ),
            )
        ),
    )
}


class UnknownRow(ValueError):
    """A row was asked for that there is not."""


def references(path: Path) -> dict[str, Path]:
    """What a path is compared with, by the name that the report gives it."""
    found = {}
    for name in path.against:
        actual = name
        if name == NO_MESH and path.topology == CROSS_NODE:
            actual = "no-mesh-cross-node"
        elif name == NO_MESH and path.load is not Load.REQUESTS:
            actual = f"no-mesh-{LOADED[path.load].removeprefix('l4-')}"
        found[name] = PATHS[actual]
    return found


def select(names: Iterable[str]) -> list[Path]:
    """The paths of these rows and all that they are compared with, in the table's order; no names: all paths.

    :raises UnknownRow: a name that is no row's.
    """
    wanted = set(names)
    if unknown := wanted - PATHS.keys():
        raise UnknownRow(f"no row {', '.join(sorted(unknown))}; there are {', '.join(PATHS)}")
    if not wanted:
        wanted = set(PATHS)
    for name in list(wanted):
        wanted.update(path.name for path in references(PATHS[name]).values())
    return [path for path in PATHS.values() if path.name in wanted]


def schedule(
    paths: Sequence[Path], *, rounds: int, clients: Sequence[int], seed: int = 1
) -> Iterator[tuple[int, Path, int]]:
    """(round, path, clients) in the order to run: every round has every pair once, in an order of its own."""
    generator = random.Random(seed)
    for number in range(rounds):
        runs = [(path, count) for path in paths for count in path.clients or clients]
        generator.shuffle(runs)
        for path, count in runs:
            yield number, path, count


Results = Mapping[tuple[str, int], Sequence[Run]]
"""Runs by (path name, clients), one for each round, in the rounds' order."""
