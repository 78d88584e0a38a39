"""``mycel-agent``: command line of the node agent."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Coroutine
from pathlib import Path

from agent import host
from agent.cni_node import BUNDLE
from agent.daemon import Options, StartError, leave_node, run
from agent.flowlog import KEEP, RATE
from bpf import limits
from common import logs
from common.arguments import add_revoke_after


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
        "--cgroup",
        type=Path,
        required=True,
        metavar="FOLDER|auto",
        help="the node's cgroup: pods and our processes below it; auto finds it, also from inside of a container",
    )
    parser.add_argument("--controller", required=True, metavar="HOST:PORT")
    parser.add_argument(
        "--roots", type=Path, required=True, help="PEM file the controller's certificate is checked by"
    )
    parser.add_argument("--credential", type=Path, required=True, help="file with this node's token")
    parser.add_argument("--admin", type=_address, default=("0.0.0.0", 15020), metavar="ADDRESS:PORT")
    parser.add_argument(
        "--proxy-group",
        type=int,
        default=15008,
        metavar="GID",
        help="of the proxies: may connect to agent.sock and write in the run folder's nodeproxy/ and l7proxy/",
    )
    probers = parser.add_mutually_exclusive_group()
    probers.add_argument(
        "--prober",
        choices=("auto", "none"),
        default="none",
        help="auto: find kubelet, whose probes pass always",
    )
    probers.add_argument("--prober-cgroup", type=Path, help="processes in it are probers (kubelet)")
    parser.add_argument("--envoy-cgroup", type=Path, help="processes in it are an Envoy in l7proxy's place")
    parser.add_argument(
        "--cni-bin", type=Path, metavar="DIR", help="the node's CNI plugins: ours is put there"
    )
    parser.add_argument(
        "--cni-bin-host",
        default="",
        metavar="DIR",
        help="where the host sees it; default: without a leading /host",
    )
    parser.add_argument(
        "--cni-conf",
        type=Path,
        metavar="DIR",
        help="the node's CNI configuration: our entry is chained into it",
    )
    parser.add_argument(
        "--cni-bundle",
        type=Path,
        default=BUNDLE,
        metavar="DIR",
        help="interpreter and libraries for the plugin",
    )
    parser.add_argument(
        "--daemonset",
        default="",
        type=_namespaced,
        metavar="NAMESPACE/NAME",
        help="runs this agent: when it is gone or going at SIGTERM, the mesh is taken off the node",
    )
    parser.add_argument(
        "--outside",
        default=(),
        type=_names,
        metavar="NAMESPACE,...",
        help="namespaces that are never in the mesh",
    )
    parser.add_argument(
        "--splice",
        type=_switch,
        default=True,
        metavar="enabled|disabled",
        help="disabled: connections between two pods of this node go by TCP, as between nodes",
    )
    add_revoke_after(parser)
    parser.add_argument(
        "--flow-log",
        default="",
        metavar="FILE|-",
        help="write a JSON line for each connection that ended or was refused",
    )
    parser.add_argument(
        "--flow-log-rate", type=_count, default=RATE, metavar="N", help="lines per second at most"
    )
    parser.add_argument(
        "--flow-records", type=_count, default=KEEP, metavar="N", help="flow records kept in memory"
    )
    parser.add_argument(
        "--map-size",
        dest="map_sizes",
        default={},
        action=_MapSizes,
        metavar="NAME=ELEMENTS,...",
        help="how much a kernel map may hold, from this start on (what it holds is carried over); may be repeated",
    )
    logs.add_arguments(parser)
    return parser.parse_args(arguments)


class _MapSizes(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        given = [f"{name}={size}" for name, size in getattr(namespace, self.dest).items()]
        given += filter(None, str(values).split(","))
        try:
            setattr(namespace, self.dest, limits.parse_all(given))
        except limits.SizeError as error:
            parser.error(f"argument {option_string}: {error}")


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000000")
    return int(text)


def _switch(text: str) -> bool:
    if text not in ("enabled", "disabled"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither enabled nor disabled")
    return text == "enabled"


def _namespaced(text: str) -> str:
    namespace, slash, name = text.partition("/")
    if text and not (namespace and slash and name and "/" not in name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAMESPACE/NAME")
    return text


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT")
    return host.strip("[]"), int(port)


def parse_leave(arguments: list[str] | None = None) -> argparse.Namespace:
    """:raises SystemExit: the command line is wrong."""
    parser = argparse.ArgumentParser(
        prog="mycel-agent --leave", description="Take the mesh off this node; no agent may run here."
    )
    parser.add_argument("--leave", action="store_true", required=True)
    parser.add_argument("--run", type=Path, default=Path("/run/mycel"))
    parser.add_argument("--state", type=Path, default=Path("/var/lib/mycel"))
    parser.add_argument("--pins", type=Path, default=Path("/sys/fs/bpf/mycel"))
    logs.add_arguments(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Run until SIGTERM; status 1 and a message if that is not possible."""
    if "--leave" in sys.argv[1:]:
        options = parse_leave()
        logs.setup_from(options)
        _end(leave_node(options.run, options.state, options.pins))
        return
    options = parse()
    logs.setup_from(options)
    if options.cgroup == Path("auto"):
        try:
            # Before any thread is there: it is a thread that changes, and all that it starts.
            host.join_cgroup_namespace()
        except host.HostError as error:
            logs.get("agent").warning("cgroups of others have no names here", reason=str(error))
        try:
            options.cgroup = host.cgroup_root()
        except host.HostError as error:
            logs.get("agent").error("agent cannot run", reason=str(error))
            sys.exit(1)
    given = {name: value for name, value in vars(options).items() if not name.startswith("log_")}
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    _end(run(Options(**given)))


def _end(work: Coroutine[None, None, None]) -> None:
    try:
        asyncio.run(work)
    except StartError as error:
        logs.get("agent").error("agent cannot run", reason=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
