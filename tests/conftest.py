"""What all tests share: the needs of privileged tests, honest skips, the leak check and the conformance counts.

``MYCEL_CI=1``
    a skip that this machine could have run is a failure (see ``tests/requirements.py``).
``MYCEL_LEAKS=report``
    namespaces, interfaces, pins, cgroups and labs left behind are only reported: for a machine on which other runs go on.
``MYCEL_LEAKS=own``
    they are not looked at: for one part of a run, whose whole is looked at when all its parts have ended (``scripts/test``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

from bpf import compiled
from tests import leaks
from tests.kubernetes import api_namespace, api_server  # noqa: F401  (fixtures for all)
from tests.requirements import ALLOWED_SKIP_PREFIX, CI, SHARED, require, require_root

# The same place that scripts/setup fills, for whoever runs pytest without make.
_CACHE = Path(
    os.environ.get("MYCEL_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mycel"
)
os.environ.setdefault("BCC_KERNEL_SOURCE", str(_CACHE / "headers/current"))
# Two seconds of compiling for each of some hundred agents; the first of each version still does.
os.environ.setdefault(compiled.FOLDER, str(_CACHE / "programs"))

# Properties are about what is computed. Where three parts run side by side an example takes as long as it takes.
settings.register_profile("mycel", deadline=None)
settings.load_profile("mycel")


class ConformanceCount(NamedTuple):
    """How many cases of one suite hold. Those not applicable are in the project's own tests, each with its reason."""

    name: str
    passed: int
    total: int
    not_applicable: int


_COUNTS = pytest.StashKey[list[ConformanceCount]]()
_BEFORE = pytest.StashKey[tuple[str, leaks.Things]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_COUNTS] = []
    mark = leaks.mark_this_run()
    config.stash[_BEFORE] = mark, leaks.look(mark)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("privileged"):
        require_root()


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI a skip counts as run only if nobody could have run it."""
    if not CI or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED_SKIP_PREFIX):
        report.outcome = "failed"
        report.longrepr = f"skipped, which fails in CI: {reason}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if it left something behind. Fixtures of every scope have been torn down by now."""
    mode = os.environ.get("MYCEL_LEAKS")
    only_report = mode in ("report", "own")
    processes, things = leaks.left_over(*session.config.stash[_BEFORE], wait_for_things=not only_report)
    lines = [f"process {line}" for line in processes] + ([] if only_report else things)
    if lines:
        report = pytest.TestReport(
            nodeid="leaks",
            location=("tests/leaks.py", None, "the whole run"),
            keywords={},
            outcome="failed",
            longrepr="left on the machine:\n" + "\n".join(lines),
            when="teardown",
        )
        session.config.hook.pytest_runtest_logreport(report=report)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    elif things and mode != "own":
        session.config.issue_config_time_warning(
            pytest.PytestWarning("left on the machine: " + ", ".join(things)), stacklevel=1
        )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    counts = config.stash[_COUNTS]
    if not counts:
        return
    terminalreporter.section("conformance")
    for count in sorted(counts):
        terminalreporter.line(
            f"{count.name}: {count.passed} of {count.total} cases hold, {count.not_applicable} not applicable"
        )


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with conformance cases and seed configuration."""
    require(SHARED.is_dir(), "the shared folder beside the checkout (or MYCEL_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def conformance_count(pytestconfig: pytest.Config) -> Callable[[str, int, int, int], None]:
    """Record ``(name, passed, total, not_applicable)`` of one suite for the terminal summary."""
    counts = pytestconfig.stash[_COUNTS]

    def record(name: str, passed: int, total: int, not_applicable: int = 0) -> None:
        counts.append(ConformanceCount(name, passed, total, not_applicable))

    return record
