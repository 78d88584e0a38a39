"""The CNI plugin on this node: puts it and its entry in place, keeps them there, and takes them out again.

The order is the whole point: binaries before the entry that names them, the entry out before the binaries, so that no list ever
names a plugin that is not there, which would stop every pod of the node. A node whose binaries cannot be put right runs
without the entry, and the agent is not ready.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import cni_chain
from agent.watching import Watcher
from common import logs

_log = logs.get(__name__)

#: In the agent's image: interpreter and libraries for the plugin.
BUNDLE = Path("/usr/lib/mycel/plugin")
#: Where the node's own folders are mounted in the agent's container: the host's path follows.
HOST = "/host"
#: Seconds for which a change is left to settle: a tool that writes in pieces is done, and its own events are one.
_SETTLE = 0.05
#: Seconds between looks that nothing called for (a folder that is made later, an event that got lost), and between such
#: that read the binaries whole and collect old ones.
_LOOK = 5.0
_LOOK_WHOLE = 60.0
#: More repairs than this within a minute mean that another tool wants the file otherwise: then it is waited in between.
_REPAIRS = 6
_PAUSE = 10.0
_INSTALL_TIMEOUT = 60.0


class InstallError(Exception):
    """The plugin's files cannot be put in place."""


@dataclass(frozen=True)
class Settings:
    """``binaries`` and ``configuration`` are as the agent sees them, ``host_binaries`` as the host sees the first.

    ``bundle`` None: the launcher is for the interpreter that runs the agent.
    """

    binaries: Path
    configuration: Path
    entry: dict[str, Any]
    host_binaries: str = ""
    bundle: Path | None = BUNDLE

    @property
    def on_host(self) -> str:
        return self.host_binaries or str(self.binaries).removeprefix(HOST)


def entry(run: Path, pins: Path, outside: tuple[str, ...]) -> dict[str, Any]:
    """Our entry in a configuration list: the keys are those of :mod:`cni.plugin`."""
    return {
        "type": cni_chain.TYPE,
        "runDir": str(run),
        "pinDir": str(pins),
        "nodeStatus": "ready",
        "outsideNamespaces": sorted(set(outside)),
    }


class CniNode:
    """``problem`` says why pods of this node do not get our plugin; empty when they do."""

    def __init__(self, settings: Settings, *, holds_back: bool = False) -> None:
        """``holds_back``: no entry is put in before :meth:`go_ahead`, though the binaries are."""
        self._settings = settings
        self._may = not holds_back
        self._changed = asyncio.Event()
        self._whole = True
        self._looked_whole = 0.0
        self._repairs: deque[float] = deque(maxlen=_REPAIRS)
        self.problem = "the CNI plugin is not in place yet"

    def go_ahead(self) -> None:
        """From now on the entry belongs into the list."""
        self._may = True
        self._changed.set()

    async def put_in_place(self) -> None:
        """Binaries, then the entry. Sets :attr:`problem`."""
        before = self.problem
        if self._whole or time.monotonic() - self._looked_whole > _LOOK_WHOLE or not self._launcher_there():
            self._whole = False
            self._looked_whole = time.monotonic()
            try:
                await self._install()
            except InstallError as error:
                self._whole = True
                self._tell(before, f"CNI plugin cannot be put in place: {error}")
                await self._take_entry_out()
                return
        if not self._may:
            return
        try:
            state = await asyncio.to_thread(
                cni_chain.put_in, self._settings.configuration, self._settings.entry
            )
        except OSError as error:
            self._tell(before, f"CNI configuration: {error.filename}: {error.strerror}")
            return
        if state.changed:
            self._repairs.append(time.monotonic())
            _log.info("entry in the CNI configuration", file=str(state.file), changed=state.changed)
        self._tell(before, state.problem)

    async def watch(self) -> None:
        """Put right what others change, until cancelled."""

        def notice(folder: Path) -> None:
            if folder != self._settings.configuration:
                self._whole = True
            self._changed.set()

        with Watcher(notice) as watcher:
            while True:
                for folder in (self._settings.configuration, self._settings.binaries):
                    watcher.watch(folder)
                await self.put_in_place()
                try:
                    async with asyncio.timeout(_LOOK):
                        await self._changed.wait()
                except TimeoutError:
                    continue
                await asyncio.sleep(self._delay())
                self._changed.clear()

    async def take_out(self) -> None:
        """The entry, then the binaries.

        :raises OSError: the entry cannot be taken out; the binaries are then left too.
        :raises InstallError: the binaries cannot be removed.
        """
        changed = await asyncio.to_thread(cni_chain.take_out, self._settings.configuration)
        await self._child("--remove")
        _log.info("CNI plugin taken out of the node", changed=changed)
        self.problem = "the CNI plugin was taken out of the node"

    async def _install(self) -> None:
        bundle = self._settings.bundle
        if bundle is None:
            await self._child()
            return
        told = await self._child("--bundle", str(bundle), "--host-folder", self._settings.on_host)
        done = json.loads(told)
        if done["changed"]:
            _log.info("CNI plugin put in place", folder=self._settings.on_host)
        if done["collected"]:
            _log.info("old CNI plugins collected", bundles=done["collected"])

    async def _child(self, *arguments: str) -> str:
        """Run the installer, which is the plugin's own code (:mod:`cni.install`)."""
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cni.install", str(self._settings.binaries), *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_INSTALL_TIMEOUT):
                done, errors = await child.communicate()
        except BaseException as error:
            if child.returncode is None:
                child.kill()
                await child.wait()
            if isinstance(error, TimeoutError):
                raise InstallError(f"not done in {_INSTALL_TIMEOUT:g} s") from None
            raise
        if child.returncode:
            raise InstallError(errors.decode(errors="replace").strip())
        return done.decode()

    async def _take_entry_out(self) -> None:
        try:
            await asyncio.to_thread(cni_chain.take_out, self._settings.configuration)
        except OSError as error:
            _log.error("CNI entry cannot be taken out", file=error.filename, reason=error.strerror)

    def _launcher_there(self) -> bool:
        return os.access(self._settings.binaries / cni_chain.TYPE, os.X_OK)

    def _delay(self) -> float:
        if len(self._repairs) == _REPAIRS and time.monotonic() - self._repairs[0] < 60:
            _log.warning(
                "another tool keeps rewriting the CNI configuration",
                folder=str(self._settings.configuration),
                repairs=_REPAIRS,
                wait_s=_PAUSE,
            )
            return _PAUSE
        return _SETTLE

    def _tell(self, before: str, problem: str) -> None:
        self.problem = problem
        if problem and problem != before:
            _log.error("pods of this node do not get the CNI plugin", reason=problem)
