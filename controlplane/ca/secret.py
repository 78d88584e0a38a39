"""The root of a cluster's authority: in a Secret that controllers alone may read, the same for every replica.

The Secret is applied empty; the first controller fills it, by compare-and-set on its resourceVersion, and whoever comes second
takes what is there. One that is broken is an error that a person has to look at: nothing is ever written over it. A copy lies in
the controller's own state folder, so that it can start again while the API server is away; and a Secret that was emptied (removed
and applied again) gets back the root that is in use, for with a new one beside it half of the mesh would refuse the other.

Also keeps the ConfigMap with the public bundle right, which agents and proxies mount.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from common import logs
from common.kubernetes import ApiError, Client, Unreachable, path_of
from controlplane.ca.authority import (
    Authority,
    AuthorityError,
    Root,
    keep_root,
    load_authority,
    make_root,
    read_root,
    utc_now,
)

_log = logs.get(__name__)

SECRET = "mycel-ca"
CONFIG_MAP = "mycel-roots"
_KEY, _ROOT, _BUNDLE = "root.key", "root.pem", "roots.pem"
#: Seconds between attempts while the Secret cannot be had.
_AGAIN = 1.0
#: Seconds that the API server may take before the copy on disk has to do.
_PATIENCE = 5.0
#: Seconds between looks at what others may have changed.
_CHECK_ROOT = 60.0
_CHECK_BUNDLE = 10.0


class SharedRoot:
    """The Secret and the copy of it under ``folder``."""

    def __init__(
        self, client: Client, namespace: str, folder: Path, clock: Callable[[], datetime] = utc_now
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._secret = path_of("v1", "secrets", namespace, SECRET)
        self._where = f"Secret {namespace}/{SECRET}"
        self._folder = folder
        self._clock = clock
        self._root: Root | None = None  #: the one in use

    async def open(self) -> Authority:
        """The authority; waits until the Secret is there, or the API server if there is no copy.

        :raises AuthorityError: Secret or copy are broken.
        :raises OSError: the copy cannot be written.
        """
        complained = ""
        while True:
            try:
                async with asyncio.timeout(_PATIENCE):
                    root = await self._fill()
            except (ApiError, Unreachable, TimeoutError) as e:
                away = not isinstance(e, ApiError) or e.status >= 500
                copy = read_root(self._folder, self._clock()) if away else None
                if copy is not None:
                    _log.warning("the root is the copy on disk: its Secret cannot be read", error=_text(e))
                    self._root = copy
                    return load_authority(copy, str(self._folder), self._clock())
                if complained != (complained := _text(e)):
                    _log.error("the root cannot be had; waiting", secret=self._where, error=complained)
                await asyncio.sleep(_AGAIN)
                continue
            authority = load_authority(root, self._where, self._clock())
            keep_root(self._folder, root)
            self._root = root
            return authority

    async def watch(self, authority: Authority) -> None:
        """Say so when the Secret holds another root than the one in use; runs until cancelled.

        A root is changed by hand, and taken by a restart: two roots in use at a time, and trusted by all, have an order that
        only a person can keep.
        """
        while True:
            await asyncio.sleep(_CHECK_ROOT)
            await self.check(authority)

    async def check(self, authority: Authority) -> None:
        """Look at the Secret once, after :meth:`open` has given ``authority``."""
        try:
            root = await self._fill()
            if load_authority(root, self._where, self._clock()).roots != authority.roots:
                _log.error(
                    "the Secret holds another root: restart the controllers to use it", secret=self._where
                )
        except AuthorityError as e:
            _log.error("the root's Secret is broken; the root in use stays", error=str(e))
        except (ApiError, Unreachable) as e:
            _log.debug("the root's Secret cannot be read", error=str(e))

    async def _fill(self) -> Root:
        """The Secret's root. Into an empty one the root in use is put, else the copy's, else a new one."""
        secret = await self._client.get(self._secret)
        there = _root_of(secret, self._where)
        if there is not None:
            return there
        before = self._root or read_root(self._folder, self._clock())
        root = before or make_root(self._clock())
        data = {_KEY: root.key, _ROOT: root.certificate}
        secret["data"] = (secret.get("data") or {}) | {
            k: base64.b64encode(v).decode() for k, v in data.items()
        }
        try:
            # With the resourceVersion that was read: only if nobody has written since.
            await self._client.replace(self._secret, secret, fieldManager="mycel-controlplane")
        except ApiError as e:
            if e.reason != "Conflict":
                raise
            return await self._fill()
        if before is None:
            _log.info("new root", secret=self._where)
        else:
            _log.warning("the root's Secret was empty: the root in use was put back", secret=self._where)
        return root


def _root_of(secret: Mapping[str, Any], where: str) -> Root | None:
    data = secret.get("data") or {}
    if _KEY not in data and _ROOT not in data:
        return None
    try:
        return Root(*(base64.b64decode(data[name], validate=True) for name in (_KEY, _ROOT)))
    except KeyError as e:
        raise AuthorityError(f"{where}: {e.args[0]} is missing beside the other; restore it") from e
    except (binascii.Error, ValueError, TypeError) as e:
        raise AuthorityError(f"{where}: its data cannot be read: {e}") from e


class PublicRoots:
    """The ConfigMap that agents and proxies mount; for the leader."""

    def __init__(self, client: Client, namespace: str, bundle: str) -> None:
        self._client = client
        self._path = path_of("v1", "configmaps", namespace, CONFIG_MAP)
        self._bundle = bundle

    async def keep(self) -> None:
        """Keep the bundle right; runs until cancelled."""
        complained = ""
        while True:
            try:
                await self.put()
                complained = ""
                await asyncio.sleep(_CHECK_BUNDLE)
            except (ApiError, Unreachable) as e:
                if complained != (complained := _text(e)):
                    _log.error("the public roots cannot be written", config_map=CONFIG_MAP, error=complained)
                await asyncio.sleep(_AGAIN)

    async def put(self) -> bool:
        """Put the bundle right; True if it was not.

        :raises ApiError, Unreachable: it cannot be.
        """
        there = await self._client.get(self._path)
        if (there.get("data") or {}).get(_BUNDLE) == self._bundle:
            return False
        await self._client.patch(
            self._path, {"data": {_BUNDLE: self._bundle}}, fieldManager="mycel-controlplane"
        )
        _log.info("public roots written", config_map=CONFIG_MAP)
        return True


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
