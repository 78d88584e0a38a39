"""What the commands meet: a controller and clients (real HTTP servers, of the processes' own admin server), or a whole mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from common.admin import AdminServer
from lab import Lab

#: ``serve(registry, json={...}, ready=...)`` gives the address, ``HOST:PORT``.
Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(
            registry: CollectorRegistry | None = None,
            *,
            json: dict[str, Callable[[], Any]] | None = None,
            ready: bool | str = True,
            queries: dict[str, Callable[[Mapping[str, str]], Any]] | None = None,
        ) -> str:
            server = AdminServer(
                "127.0.0.1",
                0,
                registry=registry or CollectorRegistry(),
                ready=lambda: ready,
                json=json,
                queries=queries,
            )
            stack.enter_context(server)
            return f"127.0.0.1:{server.port}"

        yield start


@pytest.fixture(scope="package")
def lab() -> Iterator[Lab]:
    """Two nodes with the mesh, for all modules of this folder; each works in namespaces of its own."""
    with Lab(nodes=2, ipv6=True) as lab:
        lab.namespace("default")
        yield lab
