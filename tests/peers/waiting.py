"""Until an Envoy is there."""

from __future__ import annotations

import socket
import time
import urllib.request
from pathlib import Path

import pytest

from tests.peers.envoy_hbone import Address


def accepts(path: Path) -> bool:
    """Whether somebody listens on a unix socket (the file is there a moment before)."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except OSError:
            return False
    return True


def wait_until_live(admin: Address) -> None:
    """Until Envoy's admin server says that its listeners are up."""
    deadline = time.monotonic() + 15
    while True:
        try:
            with urllib.request.urlopen(f"http://{admin}/ready", timeout=1) as response:
                if response.status == 200:
                    return
        except OSError:
            pass
        if time.monotonic() > deadline:
            pytest.fail(f"Envoy with its admin server at {admin} did not start")
        time.sleep(0.05)
