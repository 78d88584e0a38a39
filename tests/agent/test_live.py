"""Pods that no runtime tells of: found by their processes, watched until they end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
import uuid

import pytest

from agent import live, processes
from agent.live import Candidate, Live
from agent.pods import Attachment, AttachmentKey
from lab import cgroups
from tests.agent.pods import Netns

pytestmark = pytest.mark.privileged

ADDRESS, ADDRESS6 = "10.98.8.1", "fd98::8:1"


class Book:
    """In the node's place."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        self.known = True
        self.attached: dict[AttachmentKey, Attachment] = {}

    def candidates(self):
        return [] if self.attached else [self._candidate]

    def found_running(self):
        return list(self.attached.values())

    def lives(self, attachment: Attachment) -> bool:
        return self.known

    async def attach_running(self, attachment: Attachment, netns: int) -> None:
        self.attached[attachment.key] = attachment

    async def delete(self, key: AttachmentKey) -> None:
        del self.attached[key]


async def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


class Container:
    """A process in a pod's cgroup and namespace."""

    def __init__(self, cgroup, netns: Netns) -> None:
        enter = ["nsenter", f"--net={netns.path}", "sleep", "60"]
        self.process = subprocess.Popen([*cgroups.joining(cgroup), *enter])
        self._inode = os.stat(netns.path).st_ino

    def started(self) -> bool:
        return processes.netns_inode_of(self.process.pid) == self._inode

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


async def test_a_pod_without_a_process_lives_until_the_controller_says_otherwise(monkeypatch):
    """As between two containers under a runtime that keeps none for the sandbox; an agent may start meanwhile."""
    monkeypatch.setattr(live, "AGAIN", 0.05)
    uid = str(uuid.uuid4())
    top = cgroups.root() / f"mycel-node-{uid[:8]}"
    cgroup = top / f"pod{uid}"
    cgroup.mkdir(parents=True)
    book = Book(Candidate(uid, "default", "web", (ADDRESS, ADDRESS6)))
    looks: list[str] = []
    find = Live._find

    async def counted(self, wanted):
        found = await find(self, wanted)
        looks.append("found" if found else "nothing")
        return found

    monkeypatch.setattr(Live, "_find", counted)
    with Netns() as netns:
        netns.add_address(f"{ADDRESS}/24")
        netns.add_address(f"{ADDRESS6}/128", "lo")
        container = Container(cgroup, netns)
        running = asyncio.create_task((watching := Live(book)).run())
        try:
            await until(container.started)
            watching.changed()
            await until(lambda: book.attached)
            container.end()
            await until(lambda: looks[-3:] == ["nothing"] * 3)
            assert book.attached
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            running = asyncio.create_task((watching := Live(book)).run())
            looks.clear()
            await until(lambda: looks[-3:] == ["nothing"] * 3)
            assert book.attached
            container = Container(cgroup, netns)
            await until(lambda: "found" in looks)
            looks.clear()
            container.end()
            await until(lambda: looks)
            assert book.attached
            book.known = False
            await until(lambda: not book.attached)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            container.end()
            cgroups.remove(top)
