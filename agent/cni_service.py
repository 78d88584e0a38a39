"""Serves the CNI plugin: one request and one reply per connection, and the notes of those that found no agent.

Owns the protocol's checks and the time limits; what a request does to the node is :mod:`agent.attaching`'s. Nothing here waits
longer than the plugin does.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from agent.packets import Connection
from agent.pods import Attachment, AttachmentKey, Refusal
from bpf import wire
from cni import protocol
from common import logs

_log = logs.get(__name__)

#: Seconds for the whole of one request, below the plugin's own :data:`cni.protocol.REPLY_TIMEOUT`.
REQUEST_TIMEOUT = 13.0
#: Seconds that are left to the plugin to tell.
_ANSWER = 2.0
#: Seconds between looks at the notes (the start and every ADD look too).
NOTES_INTERVAL = 2.0


class Target(Protocol):
    """What requests act on. Each method raises :class:`Refusal` with the code that the runtime is to see."""

    async def add(self, attachment: Attachment, netns: int) -> None: ...
    async def delete(self, key: AttachmentKey) -> None: ...
    async def check(self, attachment: Attachment, netns: int) -> None: ...
    async def collect(self, network: str, valid: frozenset[AttachmentKey]) -> None: ...
    async def status(self) -> None: ...


class CniService:
    """``latencies`` receives (command, seconds, code) of each request."""

    def __init__(self, run_dir: Path, target: Target, *, latencies: Any) -> None:
        self._notes = run_dir / protocol.NOTES
        self._target = target
        self._latencies = latencies

    async def serve(self, connection: Connection) -> None:
        """Serve one connection of the plugin."""
        async with asyncio.timeout(REQUEST_TIMEOUT):
            data, fds = await connection.receive()
        if not data:
            return
        begin = time.monotonic()
        limit = REQUEST_TIMEOUT
        command, code, message, details = "", 0, "", ""
        try:
            request = protocol.decode(data)
            limit = _limit(request)
            command = str(request.get("command", ""))
            if command == "ADD" and connection.ended:
                # We were stopped, or had too much to do, and its runtime has been told so.
                raise Refusal(protocol.ERR_TRY_AGAIN, "the plugin has given up waiting")
            async with asyncio.timeout(limit):
                await self._do(command, request, fds)
        except protocol.ProtocolError as error:
            code, message, details = (
                protocol.ERR_DECODE,
                "the agent does not understand this plugin",
                str(error),
            )
        except Refusal as refusal:
            code, message, details = refusal.code, refusal.message, refusal.details
        except TimeoutError:
            code, message = protocol.ERR_TRY_AGAIN, f"not done within {limit:g} s"
        except Exception as error:
            _log.exception("CNI request failed", command=command)
            code, message = protocol.ERR_TRY_AGAIN, "the agent failed"
            details = f"{type(error).__name__}: {error}"
        finally:
            for fd in fds:
                os.close(fd)
        self._latencies(command, time.monotonic() - begin, code)
        if code:
            _log.warning("CNI request refused", command=command, code=code, reason=message, details=details)
        await connection.send(protocol.reply(code=code, message=message, details=details))

    async def _do(self, command: str, request: dict[str, Any], fds: tuple[int, ...]) -> None:
        match command:
            case "ADD" | "CHECK":
                if len(fds) != 1:
                    raise Refusal(
                        protocol.ERR_INVALID_ENVIRONMENT, "the request came without the pod's namespace"
                    )
                attachment = attachment_of(request)
                if command == "ADD":
                    await self.work_off_notes()
                    await self._target.add(attachment, fds[0])
                else:
                    await self._target.check(attachment, fds[0])
            case "DEL":
                await self._target.delete(key_of(request))
            case "GC":
                valid = request.get("valid_attachments")
                if not isinstance(valid, list):
                    raise Refusal(protocol.ERR_INVALID_CONFIG, "the list of valid attachments is missing")
                keys = frozenset(AttachmentKey(str(container), str(ifname)) for container, ifname in valid)
                await self._target.collect(str(request.get("network", "")), keys)
            case "STATUS":
                await self._target.status()
            case _:
                raise Refusal(
                    protocol.ERR_INVALID_ENVIRONMENT, f"command {command!r} is not known to the agent"
                )

    async def work_off_notes(self) -> None:
        """Do what plugins left while no agent answered. A note that fails stays for the next time."""
        try:
            names = sorted(name for name in os.listdir(self._notes) if not name.startswith("."))
        except FileNotFoundError:
            return
        for name in names:
            path = self._notes / name
            try:
                request = protocol.decode(path.read_bytes())
            except FileNotFoundError:
                continue  # worked off meanwhile by another request
            except protocol.ProtocolError as error:
                _log.error("clean-up note is no use and was removed", file=str(path), reason=str(error))
            else:
                try:
                    await self._target.delete(key_of(request))
                except Refusal as refusal:
                    _log.warning("noted clean-up failed and is kept", file=str(path), reason=refusal.message)
                    continue
                _log.info(
                    "noted clean-up done",
                    container_id=request.get("container_id"),
                    ifname=request.get("ifname"),
                )
            path.unlink(missing_ok=True)

    async def watch_notes(self) -> None:
        """Work notes off from time to time, until cancelled."""
        while True:
            await asyncio.sleep(NOTES_INTERVAL)
            try:
                await self.work_off_notes()
            except OSError as error:
                _log.error("clean-up notes cannot be read", folder=str(self._notes), reason=str(error))


def key_of(request: dict[str, Any]) -> AttachmentKey:
    return AttachmentKey(str(request.get("container_id", "")), str(request.get("ifname", "")))


def _canonical(address: str) -> str:
    """As others write it; what is no address stays as it is, and is nobody's."""
    try:
        return wire.canonical(address)
    except ValueError:
        return address


def attachment_of(request: dict[str, Any]) -> Attachment:
    addresses = request.get("addresses")
    return Attachment(
        container_id=str(request.get("container_id", "")),
        ifname=str(request.get("ifname", "")),
        network=str(request.get("network", "")),
        netns_path=str(request.get("netns", "")),
        addresses=tuple(_canonical(str(a)) for a in addresses) if isinstance(addresses, list) else (),
        pod_uid=str(request.get("pod_uid", "")),
        pod_namespace=str(request.get("pod_namespace", "")),
        pod_name=str(request.get("pod_name", "")),
    )


def _limit(request: Mapping[str, Any]) -> float:
    """Seconds for a request: less than its plugin waits, so that it hears why, and more where it waits longer than usual."""
    patience = request.get("patience_ms")
    if isinstance(patience, bool) or not isinstance(patience, int):
        return REQUEST_TIMEOUT
    return max(REQUEST_TIMEOUT, min(patience / 1000, protocol.LONGEST_TIMEOUT) - _ANSWER)
