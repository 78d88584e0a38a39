"""``mycel-l7proxy``: command line and process life of the L7 proxy."""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys
from pathlib import Path

import uvloop
from prometheus_client import CollectorRegistry

from common import descriptors, logs
from common.admin import AdminServer
from l7proxy.accesslog import AccessLog
from l7proxy.resources import TYPES, Resources
from l7proxy.server import Proxy
from l7proxy.xds import XdsClient

_log = logs.get(__name__)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mycel-l7proxy", description="The L7 proxy of a node.")
    parser.add_argument("--node", required=True, help="this node's name")
    parser.add_argument("--run", default="/run/mycel", help="folder of agent.sock and nodeproxy.sock")
    parser.add_argument("--controller", required=True, metavar="HOST:PORT")
    parser.add_argument(
        "--roots", type=Path, required=True, help="PEM bundle that the controller's certificate chains to"
    )
    parser.add_argument("--credential", type=Path, required=True, help="file with this node's token")
    parser.add_argument("--admin", default="127.0.0.1:15090", metavar="ADDRESS:PORT")
    parser.add_argument("--access-log", metavar="FILE", help="'-' for standard output; none without it")
    parser.add_argument(
        "--state", type=Path, help="folder for the last good configuration (default: RUN/l7proxy)"
    )
    parser.add_argument(
        "--drain-timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="that open connections have after SIGTERM, while a successor serves (the pod's grace period is longer)",
    )
    logs.add_arguments(parser)
    return parser.parse_args(argv)


async def _run(arguments: argparse.Namespace) -> None:
    descriptors.raise_limit()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    access_log = AccessLog(arguments.access_log) if arguments.access_log else None
    proxy = Proxy(node=arguments.node, run=arguments.run, access_log=access_log)
    loop.add_signal_handler(signal.SIGUSR1, proxy.reopen_access_log)

    resources = Resources(arguments.state or Path(arguments.run) / "l7proxy")
    if resources.load():
        proxy.publish(resources.build())
        _log.info("last good configuration read", version=proxy.config.version)
    xds = XdsClient(
        target=arguments.controller,
        roots=arguments.roots,
        credential=arguments.credential,
        node=arguments.node,
        resources=resources,
        publish=proxy.publish,
        admin=arguments.admin,
    )
    proxy.fresh = lambda: xds.synced

    def keep() -> None:
        for kind in TYPES:
            if resources.versions[kind]:
                resources.write(resources.kept(kind))

    proxy.keep = keep
    metrics = proxy.metrics
    metrics.value(
        "mycel_l7proxy_xds_connected",
        "1 while the controller is there.",
        "gauge",
        lambda: float(xds.connected),
    )
    metrics.value("mycel_l7proxy_xds_updates", "Responses received.", "counter", lambda: xds.updates)
    metrics.value(
        "mycel_l7proxy_xds_nacks", "Responses refused, wholly or in part.", "counter", lambda: xds.nacks
    )

    def ready() -> bool | str:
        if stop.is_set():
            return "ending"
        if proxy.config.version == "":
            return "no configuration yet"
        if not proxy.agent.connected and not proxy.pods:
            return "the agent is away"
        return True if proxy.serving or proxy.draining else "not serving yet"

    def describe() -> object:
        rejected = {
            f"{kind.rpartition('.')[2]} {name}": why for (kind, name), why in dict(resources.rejected).items()
        }
        return {**proxy.describe(), "rejected": rejected}

    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics)
    host, _, port = arguments.admin.rpartition(":")
    admin = AdminServer(
        host.strip("[]"), int(port), registry=registry, ready=ready, json={"/config": describe}
    )
    admin.start()
    proxy.start()
    client = proxy.tasks.start(xds.run(), name="xds client")
    # What exists now lives as long as the process; requests leave no cycles behind, so look for them rarely.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    await stop.wait()
    _log.info("draining", seconds=arguments.drain_timeout)
    client.cancel()
    await proxy.drain(arguments.drain_timeout)
    admin.close()
    _log.info("stopped")


def main(argv: list[str] | None = None) -> None:
    arguments = _arguments(argv)
    try:
        logs.setup_from(arguments)
    except logs.LevelError as error:
        sys.exit(f"mycel-l7proxy: {error}")
    try:
        uvloop.run(_run(arguments))
    except OSError as error:
        sys.exit(f"mycel-l7proxy: {error}")


if __name__ == "__main__":
    main()
