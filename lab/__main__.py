"""``python -m lab up | exec | list | clean``: a lab to try things in, by hand."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from lab import state
from lab.errors import LabError
from lab.lab import Lab
from lab.place import Place


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser(
        "up", help="start a lab with a client and a service web-app, and keep it until Ctrl-C"
    )
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--no-mesh", action="store_true", help="Debian's CNI plugins only")
    up.add_argument(
        "--apply", type=Path, action="append", default=[], metavar="FILE", help="configuration to begin with"
    )
    run = commands.add_parser("exec", help="run a command in a pod, a node, control or fabric")
    run.add_argument("--lab", default="", help="the lab's id, if there are several")
    run.add_argument("place")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="command")
    commands.add_parser("list", help="labs on this machine and their places")
    clean = commands.add_parser("clean", help="remove what labs left whose owner is gone")
    clean.add_argument("--all", action="store_true", help="and those that are in use")
    options = parser.parse_args()
    try:
        match options.command:
            case "up":
                return _up(options.nodes, not options.no_mesh, options.apply)
            case "exec":
                return _exec(options.lab, options.place, options.argv)
            case "list":
                return _list()
            case _:
                return _clean(options.all)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1


def _up(nodes: int, mesh: bool, files: list[Path]) -> int:
    with Lab(nodes, mesh=mesh) as lab:
        lab.namespace("default")
        address = lab.service("web-app", 80, target_port=8080)
        for number in range(1, nodes + 1):
            version = f"v{number}"
            pod = lab.pod(
                f"web-app-{version}",
                node=f"node{number}",
                service_account="web-app",
                labels={"app": "web-app", "version": version},
                ports=[8080],
            )
            pod.serve(pod.app("http_server", 8080, "--version", version), 8080)
        lab.pod("client", node="node1", service_account="client")
        for file in files:
            lab.apply(file)
        lab.settle()
        print(
            f"lab {lab.id}: {nodes} nodes in {lab.start_seconds:.1f} s, configuration in {lab.cluster.policies}"
        )
        print("places: " + ", ".join(state.places(lab.state)))
        print(f"try:    python -m lab exec client curl -s http://{address}/")
        try:
            signal.pause()
        except (KeyboardInterrupt, SystemExit):
            print("ending")
    return 0


def _exec(wanted: str, name: str, argv: list[str]) -> int:
    found = [lab for lab in state.labs() if not lab.stale and wanted in ("", lab.id)]
    if len(found) != 1:
        raise LabError(f"{len(found)} labs are running" + (", choose one with --lab" if found else ""))
    places = state.places(found[0])
    if name not in places:
        raise LabError(f"no place {name}: there are {', '.join(places)}")
    values = places[name]
    mount = Path(values["mount"]) if values["mount"] else None
    place = Place(name, net=Path(values["net"]), cgroup=Path(values["cgroup"]), mount=mount)
    command = place.command(argv or [os.environ.get("SHELL", "/bin/bash")])
    os.execv(command[0], command)


def _list() -> int:
    for lab in state.labs():
        owner = "stale" if lab.stale else f"process {lab.pid}"
        print(f"{lab.id}\t{owner}\t{lab.folder}\t{' '.join(state.places(lab))}")
    return 0


def _clean(everything: bool) -> int:
    for lab in state.labs():
        if lab.stale or everything:
            state.reap(lab)
            print(f"removed lab {lab.id}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
