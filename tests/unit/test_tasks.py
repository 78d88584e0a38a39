import asyncio
import gc
import logging

import pytest

from common import tasks


async def fail() -> None:
    raise RuntimeError("no upstream")


async def test_a_task_has_its_name_and_its_result() -> None:
    async def answer() -> int:
        return 42

    task = tasks.start(answer(), name="answer")
    assert task.get_name() == "answer"
    assert await task == 42


async def test_a_task_that_nobody_holds_runs_to_its_end() -> None:
    """The event loop holds tasks weakly: one that waits for something only itself refers to would be collected."""
    ended = asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            ended.set()

    group = tasks.Tasks()
    group.start(wait(), name="wait")
    await asyncio.sleep(0)
    gc.collect()
    assert len(group) == 1
    await group.cancel()
    assert ended.is_set()
    assert len(group) == 0


async def test_a_failure_is_logged_with_the_task_s_name_and_handed_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures: list[BaseException] = []
    group = tasks.Tasks(on_failure=failures.append)
    group.start(fail(), name="upstream 7")
    await group.drain(1.0)
    await asyncio.sleep(0)
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.__dict__["fields"] == {"task": "upstream 7"}
    assert record.exc_info is not None
    assert [str(failure) for failure in failures] == ["no upstream"]


async def test_a_cancelled_task_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    group = tasks.Tasks(on_failure=lambda error: pytest.fail(repr(error)))
    group.start(asyncio.sleep(3600), name="sleep")
    await asyncio.sleep(0)
    await group.cancel()
    assert not caplog.records


async def test_drain_waits_until_the_deadline_and_then_forces() -> None:
    ended: list[str] = []

    async def work(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        ended.append(name)

    group = tasks.Tasks()
    group.start(work("short", 0.01), name="short")
    long = group.start(work("long", 3600), name="long")
    began = asyncio.get_running_loop().time()
    await group.drain(0.1)
    assert ended == ["short"]
    assert long.cancelled()
    assert 0.1 <= asyncio.get_running_loop().time() - began < 1.0


async def test_drain_counts_tasks_started_meanwhile() -> None:
    group = tasks.Tasks()
    ended = asyncio.Event()

    async def second() -> None:
        await asyncio.sleep(0.01)
        ended.set()

    async def first() -> None:
        group.start(second(), name="second")

    group.start(first(), name="first")
    await group.drain(5.0)
    assert ended.is_set()


async def test_a_task_may_end_its_siblings() -> None:
    group = tasks.Tasks()
    sibling = group.start(asyncio.sleep(3600), name="sibling")
    await asyncio.wait_for(group.start(group.cancel(), name="ender"), 1.0)
    assert sibling.cancelled()
