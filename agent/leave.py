"""Takes the mesh off a node: what an agent leaves alone when it is replaced goes here, when none will follow.

Owns the end of pins (programs, links, maps), of what was set in pods' namespaces, and of our files. What the runtime has of us
(plugin, conflist) is :mod:`agent.cni_chain`'s. Connections that go through the proxies end with those; all others go on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from agent import processes, sandboxes
from agent.kernel import namespace, netlink
from agent.kernel.splices import Splices
from bpf import links
from bpf.maps import Map
from common import logs

_log = logs.get(__name__)

#: Times, a tenth of a second apart, that the mesh waits for connections to leave the splice.
_SPLICE_WALKS = 20


def leave(pins: Path, folders: tuple[Path, ...], *, proc: Path = Path("/proc")) -> None:
    """Leave nothing of ours; what cannot be removed is logged, and the rest is removed all the same.

    No agent may run on this node, and no file of ``pins`` be open.

    :param pins: the folder that holds ``v<ABI>``; those of older versions go too.
    :param folders: the run folder and the state folder. They are emptied, and removed unless something is mounted on them.
    """
    inodes = set(_guarded(pins))
    _empty_splice(pins)
    _remove_filters(pins)
    # The programs first, all of them, so that none of them judges by what others have lost already.
    for path in (
        sorted(pins.glob("v*/link_*")) + sorted(pins.glob("v*/netns/*")) + sorted(pins.glob("v*/veth/*"))
    ):
        _remove(path)
    _remove_tree(pins)
    _restore(inodes, proc)
    for folder in folders:
        _remove_tree(folder)
    _log.info(
        "the mesh has left this node", pins=str(pins), folders=",".join(str(folder) for folder in folders)
    )


def _empty_splice(pins: Path) -> None:
    """Let connections go back to TCP; those whose applications do not read stay right without us, and slow."""
    for folder in pins.glob("v*"):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            names = ("splice_counters", "splice_wakes")
            opened = {name: stack.enter_context(Map.open(str(folder / name))) for name in names}
            splices = stack.enter_context(contextlib.closing(Splices(folder, opened)))
            splices.switch(False)
            for _ in range(_SPLICE_WALKS):
                if splices.walk() == (0, 0, 0):
                    break
                time.sleep(0.1)


def _remove_filters(pins: Path) -> None:
    """Programs at pods' veths, where the kernel knows no links for them: no pin keeps those."""
    for path in pins.glob("v*/interfaces"):
        with contextlib.suppress(OSError), Map.open(str(path)) as interfaces:
            for key in tuple(interfaces.keys()):
                for ingress in (True, False):
                    with contextlib.suppress(OSError):
                        netlink.remove_filter(int.from_bytes(key, sys.byteorder), ingress=ingress)


def _guarded(pins: Path) -> Iterator[int]:
    """The namespaces with a program of ours, by inode."""
    for path in pins.glob("v*/netns/*"):
        with contextlib.suppress(OSError):
            link = links.open_pin(str(path))
            try:
                yield links.link_info(link).where
            finally:
                os.close(link)


def _restore(inodes: set[int], proc: Path) -> None:
    """Undo what was set in pods' namespaces: in those that had a program, and in those of pods that had left before."""
    own = processes.netns_inode_of("self", proc)
    pids = {pid for pid, _ in sandboxes.processes_of_pods(proc)}
    seen = {own}
    for entry in os.listdir(proc):
        if not entry.isdigit():
            continue
        path = proc / entry / "ns/net"
        with contextlib.suppress(OSError):
            inode = path.stat().st_ino
            if inode in seen or not (inode in inodes or int(entry) in pids):
                continue
            seen.add(inode)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if namespace.is_prepared(fd):
                    namespace.restore(fd)
            except OSError as error:
                _log.error("pod's namespace keeps what was set in it", pid=entry, reason=str(error))
            finally:
                os.close(fd)


def _remove_tree(folder: Path) -> None:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, onerror=_complain)
        else:
            _remove(path)
    # Of a folder that is mounted into this container only the content is ours to remove.
    with contextlib.suppress(OSError):
        folder.rmdir()


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _complain(None, str(path), (type(error), error, None))


def _complain(_function: object, path: str, problem: tuple[object, object, object]) -> None:
    _log.error("cannot be removed", path=path, reason=str(problem[1]))
