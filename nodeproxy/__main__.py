"""``mycel-nodeproxy``: the command line, and who runs in which thread."""

from __future__ import annotations

import argparse
import gc
import signal
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector

from common import descriptors, logs
from common.admin import AdminServer
from common.arguments import add_revoke_after
from controlplane.api import SignRequest
from nodeproxy.controller import Controller
from nodeproxy.loop import Loop
from nodeproxy.node import NodeProxy

_log = logs.get("nodeproxy")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mycel-nodeproxy", description="HBONE for the pods of one node.")
    parser.add_argument("--node", required=True, help="the node's name")
    parser.add_argument("--run", required=True, type=Path, help="the run folder, where agent.sock is")
    parser.add_argument("--controller", required=True, help="ADDRESS:PORT of the controller")
    parser.add_argument(
        "--roots", required=True, type=Path, help="PEM that the controller's certificate chains to"
    )
    parser.add_argument("--credential", required=True, type=Path, help="the node's token")
    parser.add_argument("--admin", required=True, help="ADDRESS:PORT for metrics and readiness")
    parser.add_argument(
        "--drain-timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="that open connections have after SIGTERM, while a successor serves (the pod's grace period is longer)",
    )
    add_revoke_after(parser)
    parser.add_argument("--envoy", type=Path, help="unix socket of an Envoy in l7proxy's place")
    logs.add_arguments(parser)
    options = parser.parse_args(arguments)
    logs.setup_from(options)
    logs.set_levels("hpack:warning")  # it tells of every byte
    try:
        return _run(options)
    except (OSError, ValueError) as error:
        _log.error("cannot start", reason=str(error))
        return 1


def _run(options: argparse.Namespace) -> int:
    descriptors.raise_limit()
    loop = Loop()
    controllers: list[Controller] = []

    def sign(request: SignRequest, done: object) -> None:
        controllers[0].sign(request, done)  # type: ignore[arg-type]

    proxy = NodeProxy(
        loop,
        node=options.node,
        run=options.run,
        sign=sign,
        envoy=options.envoy,
        revoke_after=options.revoke_after,
    )
    controller = Controller(
        options.controller,
        roots=options.roots,
        credential=options.credential,
        admin=options.admin,
        post=loop.post,
        on_update=proxy.update,
        version=lambda: proxy.mesh.version,
    )
    controllers.append(controller)
    registry = CollectorRegistry()
    registry.register(proxy.accounting)
    ProcessCollector(registry=registry)
    host, _, port = options.admin.rpartition(":")
    admin = AdminServer(
        host.strip("[]"),
        int(port),
        registry=registry,
        ready=proxy.ready,
        json={"/debug/state": proxy.state},
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.post(lambda: proxy.drain(options.drain_timeout)))
    proxy.start()
    controller.start()
    admin.start()
    _log.info("node proxy runs", node=options.node, admin=options.admin)
    # What lives now lives for ever: not worth looking at in each collection.
    gc.freeze()
    try:
        loop.run()
    finally:
        controller.stop()
        admin.close()
        loop.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
