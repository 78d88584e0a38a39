"""``mycel-agent``: command line of the node agent."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from agent.daemon import Options, StartError, run
from common import logs


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """:raises SystemExit: the command line is wrong."""
    parser = argparse.ArgumentParser(prog="mycel-agent", description="The mesh's agent on one node.")
    parser.add_argument("--node", required=True, help="this node's name, as Pod.spec.nodeName has it")
    parser.add_argument("--run", type=Path, default=Path("/run/mycel"), help="folder of the local sockets")
    parser.add_argument(
        "--state", type=Path, default=Path("/var/lib/mycel"), help="folder of the last good state"
    )
    parser.add_argument(
        "--pins", type=Path, default=Path("/sys/fs/bpf/mycel"), help="folder on a bpf file system"
    )
    parser.add_argument(
        "--cgroup", type=Path, required=True, help="the node's cgroup: pods and our processes below it"
    )
    parser.add_argument("--controller", required=True, metavar="HOST:PORT")
    parser.add_argument(
        "--roots", type=Path, required=True, help="PEM file the controller's certificate is checked by"
    )
    parser.add_argument("--credential", type=Path, required=True, help="file with this node's token")
    parser.add_argument("--admin", type=_address, default=("0.0.0.0", 15020), metavar="ADDRESS:PORT")
    parser.add_argument("--prober-cgroup", type=Path, help="processes in it are probers (kubelet)")
    parser.add_argument("--envoy-cgroup", type=Path, help="processes in it are an Envoy in l7proxy's place")
    logs.add_arguments(parser)
    return parser.parse_args(arguments)


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT")
    return host.strip("[]"), int(port)


def main() -> None:
    """Run until SIGTERM; status 1 and a message if that is not possible."""
    options = parse()
    logs.setup_from(options)
    given = {name: value for name, value in vars(options).items() if not name.startswith("log_")}
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        asyncio.run(run(Options(**given)))
    except StartError as error:
        logs.get("agent").error("agent cannot run", reason=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
