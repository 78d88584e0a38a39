"""The controller's process: ``mycel-controlplane``."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

from common import descriptors, logs, spiffe
from common.kubernetes import AccessError
from controlplane import cluster
from controlplane.ca.authority import AuthorityError
from controlplane.controller import Options, folder_backing, run
from controlplane.model.world import OUTSIDE

_log = logs.get(__name__)


def main() -> None:
    """Parse the command line and serve until SIGTERM or SIGINT. Exit status 1 with a log line if it cannot start."""
    parser = _parser()
    arguments = parser.parse_args()
    logs.setup_from(arguments)
    descriptors.raise_limit()
    if arguments.kubernetes:
        if not arguments.namespace:
            parser.error("--kubernetes needs --namespace")
    elif not (arguments.config and arguments.credentials and arguments.server_name):
        parser.error("without --kubernetes: --config, --credentials and --server-name are needed")
    try:
        asyncio.run(_serve(arguments))
    except (OSError, AuthorityError, AccessError, spiffe.SpiffeError) as e:
        _log.error("cannot start", error=str(e))
        sys.exit(1)


async def _serve(arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    options = Options(
        state=arguments.state,
        listen=arguments.listen,
        admin=arguments.admin,
        server_names=tuple(arguments.server_name or ()),
        trust_domain=arguments.trust_domain,
        outside=OUTSIDE | {arguments.namespace} if arguments.kubernetes else OUTSIDE,
    )
    if arguments.kubernetes:
        await cluster.run(
            options,
            cluster.Options(
                namespace=arguments.namespace,
                replica=arguments.replica or os.environ.get("HOSTNAME") or "mycel-controlplane",
                credential=arguments.credential,
                kubeconfig=arguments.kubeconfig,
                webhook=arguments.webhook,
            ),
            stop,
        )
    else:
        await run(options, folder_backing(arguments.config, arguments.credentials, arguments.state), stop)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mycel-controlplane", description="Mycel's controller.")
    parser.add_argument("--state", type=Path, required=True, help="folder for keys and the last good state")
    parser.add_argument("--listen", default="0.0.0.0:15012", help="xDS, workload stream and CA (TLS)")
    parser.add_argument("--admin", default="127.0.0.1:15014", help="metrics and /debug pages")
    parser.add_argument(
        "--server-name",
        action="extend",
        nargs="+",
        help="DNS names and addresses that clients call it by (on Kubernetes: besides those of its Service)",
    )
    parser.add_argument("--trust-domain", default="cluster.local")
    folder = parser.add_argument_group("a folder as the source")
    folder.add_argument("--config", type=Path, help="folder of Kubernetes manifests")
    folder.add_argument(
        "--credentials", type=Path, help="folder with one file per node: SHA-256 (hex) of its token"
    )
    kubernetes = parser.add_argument_group("Kubernetes as the source")
    kubernetes.add_argument("--kubernetes", action="store_true", help="the API server is the source")
    kubernetes.add_argument("--kubeconfig", type=Path, help="by default the pod's own account")
    kubernetes.add_argument("--namespace", help="where the controller lives, its Secret, Lease and ConfigMap")
    kubernetes.add_argument("--replica", help="this controller's name among its replicas (the pod's name)")
    kubernetes.add_argument(
        "--credential",
        type=Path,
        default=Path("/var/run/secrets/mycel.io/token"),
        help="file with the token by which the other replicas know this one",
    )
    kubernetes.add_argument("--webhook", help="ADDRESS:PORT of the validating webhook; none without")
    logs.add_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
