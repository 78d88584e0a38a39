"""Upstream connections: which the node proxy may carry, whatever the proxy heard of the endpoint, and how old those get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.tasks import Tasks
from l7proxy.connector import Connector
from l7proxy.model import Endpoint
from l7proxy.pool import TUNNEL_AGE, HostPool


class Connection:
    usable = True
    closed = False

    def __init__(self, made: float) -> None:
        self.made = made

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("node", "enrolled", "tunnelled", "ages"),
    [
        ("n1", True, False, False),
        ("n2", True, True, True),
        ("n2", False, False, True),
        ("", False, False, False),
    ],
)
def test_none_that_the_node_proxy_may_carry_gets_old(monkeypatch, node, enrolled, tunnelled, ages):
    """The kernel turns to it what is in the mesh on another node, though it was dialled in plain text."""
    connector = Connector("n1", "/nowhere", Tasks())
    assert (connector.tunnelled(node, enrolled), connector.elsewhere(node)) == (tunnelled, ages)
    endpoint = Endpoint("10.0.2.1", 80, uid="uid", node=node, enrolled=enrolled)
    pool = HostPool(cast(Any, SimpleNamespace()), endpoint, tunnelled, lambda *_: None, ages=ages)
    monkeypatch.setattr("l7proxy.pool.monotonic", lambda: 100.0)
    for age, closed in ((TUNNEL_AGE - 1, False), (TUNNEL_AGE + 1, ages)):
        connection = Connection(100.0 - age)
        pool.release(cast(Any, connection))
        assert connection.closed is closed
