"""The controller's process: ``mycel-controlplane``."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from common import logs, spiffe
from controlplane.ca.authority import AuthorityError
from controlplane.controller import Options, run
from controlplane.credentials import FolderCredentials

_log = logs.get(__name__)


def main() -> None:
    """Parse the command line and serve until SIGTERM or SIGINT. Exit status 1 with a log line if it cannot start."""
    arguments = _parser().parse_args()
    logs.setup_from(arguments)
    options = Options(
        config=arguments.config,
        state=arguments.state,
        listen=arguments.listen,
        admin=arguments.admin,
        server_names=arguments.server_name,
        trust_domain=arguments.trust_domain,
    )
    try:
        asyncio.run(_serve(options, FolderCredentials(arguments.credentials)))
    except (OSError, AuthorityError, spiffe.SpiffeError) as e:
        _log.error("cannot start", error=str(e))
        sys.exit(1)


async def _serve(options: Options, credentials: FolderCredentials) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await run(options, credentials, stop)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mycel-controlplane", description="Mycel's controller.")
    parser.add_argument("--config", type=Path, required=True, help="folder of Kubernetes manifests")
    parser.add_argument("--state", type=Path, required=True, help="folder for keys and the last good state")
    parser.add_argument("--listen", default="0.0.0.0:15012", help="xDS, workload stream and CA (TLS)")
    parser.add_argument("--admin", default="127.0.0.1:15014", help="metrics and /debug pages")
    parser.add_argument(
        "--credentials",
        type=Path,
        required=True,
        help="folder with one file per node: SHA-256 (hex) of its token",
    )
    parser.add_argument(
        "--server-name",
        action="extend",
        nargs="+",
        required=True,
        help="DNS names and addresses that clients call it by",
    )
    parser.add_argument("--trust-domain", default="cluster.local")
    logs.add_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
