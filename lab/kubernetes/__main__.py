"""``python -m lab.kubernetes up | down | list | kubeconfig | load | exec | programs``: a cluster to try things on, by hand."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from lab.errors import LabError
from lab.kubernetes import cluster as clusters
from lab.kubernetes import programs
from lab.kubernetes.cluster import Cluster


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.kubernetes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help)
        added.add_argument("--name", default="default", help="tells clusters apart")
        return added

    up = command("up", "start a cluster, and keep it until Ctrl-C")
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--python", action="store_true", help="nodes have the machine's python3")
    up.add_argument("--keep", action="store_true", help="in the background, until `down`")
    command("down", "end a cluster, or remove what is left of one")
    command("kubeconfig", "print the path of its kubeconfig")
    load = command("load", "give every node the images of archives")
    load.add_argument("archives", type=Path, nargs="+", metavar="TAR")
    run = command("exec", "run a command on a node, or beside the API server (control)")
    run.add_argument("node")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="command")
    commands.add_parser("list", help="clusters on this machine")
    commands.add_parser(
        "programs", help="build what is missing, print the folder of kubectl, helm, etcd, ..."
    )
    options = parser.parse_args()
    try:
        match options.command:
            case "up" if options.keep:
                return _keep(options.name, options.nodes, options.python)
            case "up":
                return _up(options.name, options.nodes, options.python)
            case "down":
                if not clusters.down(options.name):
                    print(f"no cluster {options.name}")
            case "kubeconfig":
                print(Cluster.attach(options.name).kubeconfig)
            case "load":
                Cluster.attach(options.name).load(*options.archives)
            case "exec":
                return _exec(Cluster.attach(options.name), options.node, options.argv)
            case "list":
                for name in clusters.names():
                    print(name)
            case _:
                print(programs.folder())
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


def _up(name: str, nodes: int, python: bool) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Cluster(name, nodes=nodes, python=python) as cluster:
        print(f"cluster {name}: {nodes} nodes in {cluster.start_seconds:.1f} s")
        print(f"export KUBECONFIG={cluster.kubeconfig} PATH={programs.folder()}:$PATH", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("ending")
    return 0


def _keep(name: str, nodes: int, python: bool) -> int:
    """Start a process that owns the cluster, and wait until it says that all is there."""
    programs.folder()
    command = [sys.executable, "-m", "lab.kubernetes", "up", "--name", name, "--nodes", str(nodes)]
    owner = subprocess.Popen(
        [*command, *(["--python"] if python else [])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert owner.stdout is not None
    for _ in range(2):
        line = owner.stdout.readline()
        if not line:
            return owner.wait()
        print(line, end="")
    return 0


def _exec(cluster: Cluster, name: str, argv: list[str]) -> int:
    argv = argv or ["/bin/bash"]
    if name == "control":
        command = ["/usr/bin/nsenter", f"--net={cluster.network}", "--", *argv]
    else:
        command = cluster.node(name).command(argv)
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
