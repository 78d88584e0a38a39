"""One lab of two nodes for the whole suite. Each module works in namespaces of its own, so that policies do not meet."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from lab import Lab
from tests.requirements import require_program

_LAB = pytest.StashKey[Lab]()


@pytest.fixture(scope="session")
def lab(pytestconfig: pytest.Config) -> Iterator[Lab]:
    """Two nodes with the mesh. Tests that end or restart processes leave them running and settled."""
    for program in ("nsenter", "setpriv", "curl"):
        require_program(program)
    with Lab(nodes=2, ipv6=True) as lab:
        pytestconfig.stash[_LAB] = lab
        lab.namespace("default")
        yield lab


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure carries the end of every process' log."""
    report = yield
    lab = item.config.stash.get(_LAB, None)
    if report.failed and lab is not None and lab.started:
        report.sections.append(("logs of the lab", lab.logs(lines=40)))
    return report


@pytest.fixture(autouse=True)
def all_alive(lab: Lab) -> Iterator[None]:
    """No process of the mesh ends by itself, whatever a test does."""
    yield
    for process in lab.all_processes():
        assert process.running, f"{process.name} ended with status {process.exit_status}:\n{process.tail()}"
