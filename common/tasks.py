"""Starting asyncio tasks so that none is lost: named, referenced while they run, their failures logged.

Owns the references and the one way to end a group of tasks. It decides nothing about a failure but to log it; who needs
more passes ``on_failure``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from common import logs

_log = logs.get(__name__)
_T = TypeVar("_T")


class Tasks:
    """The running tasks of one component (a listener's connections, a client's streams)."""

    def __init__(self, on_failure: Callable[[BaseException], None] | None = None) -> None:
        """``on_failure`` is called with the error of a task that failed, after it was logged."""
        self._running: set[asyncio.Task[Any]] = set()
        self._on_failure = on_failure

    def __len__(self) -> int:
        return len(self._running)

    def start(self, coroutine: Coroutine[Any, Any, _T], *, name: str) -> asyncio.Task[_T]:
        """Start a task. The event loop alone would hold it weakly: here it is kept until it ends."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def drain(self, timeout: float) -> None:
        """Let the tasks end by themselves for ``timeout`` seconds, then cancel the rest; all have ended on return.

        Tasks that are started meanwhile are drained too, so stop accepting first.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        while others := self._others():
            remaining = deadline - asyncio.get_running_loop().time()
            if remaining <= 0:
                break
            await asyncio.wait(others, timeout=remaining)
        await self.cancel()

    async def cancel(self) -> None:
        """Cancel all and wait until they have ended. A task may call it for its siblings: itself it spares."""
        while others := self._others():
            for task in others:
                task.cancel()
            await asyncio.wait(others)

    def _others(self) -> set[asyncio.Task[Any]]:
        # One that has ended may wait for its callback still.
        return {task for task in self._running if not task.done()} - {asyncio.current_task()}

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            _log.exception("task failed", error, task=task.get_name())
            if self._on_failure is not None:
                self._on_failure(error)


_PROCESS = Tasks()


def start(coroutine: Coroutine[Any, Any, _T], *, name: str) -> asyncio.Task[_T]:
    """Start a task that lives as long as the process, or that its caller awaits or cancels."""
    return _PROCESS.start(coroutine, name=name)
