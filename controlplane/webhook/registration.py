"""The webhook's ``caBundle`` in ValidatingWebhookConfiguration ``mycel``: what the leading controller keeps right.

The configuration itself is the installation's, applied without a bundle, so that applying it again takes nothing away.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from common import logs
from common.kubernetes import ApiError, Client, Unreachable, path_of

_log = logs.get(__name__)
NAME = "mycel"
_PATH = path_of("admissionregistration.k8s.io/v1", "validatingwebhookconfigurations", name=NAME)
#: Seconds between looks; who replaces the configuration by one without a bundle is corrected so soon.
_EVERY = 10.0
_AGAIN = 1.0


class Registration:
    """``roots``: the bundle (PEM) that the webhook's certificate chains to."""

    def __init__(self, client: Client, roots: str, every: float = _EVERY) -> None:
        self._client = client
        self._bundle = base64.b64encode(roots.encode()).decode()
        self._every = every

    async def keep(self) -> None:
        """Keep the bundle right until cancelled: for the leader."""
        complained = ""
        while True:
            pause = self._every
            try:
                await self.correct()
                complained = ""
            except (ApiError, Unreachable) as e:
                pause = min(_AGAIN, self._every)
                if isinstance(e, ApiError) and e.status == 404:
                    pause = self._every  # not installed, or not any more
                elif str(e) != complained:
                    complained = str(e)
                    _log.warning("webhook's caBundle cannot be kept", error=complained)
            await asyncio.sleep(pause)

    async def correct(self) -> bool:
        """Write the bundle where it is another or missing; whether anything was written.

        :raises ApiError: the configuration is not there, may not be written, or was changed by someone meanwhile.
        :raises Unreachable: the API server is away.
        """
        found = await self._client.get(_PATH)
        operations: list[dict[str, Any]] = []
        for i, webhook in enumerate(found.get("webhooks") or ()):
            if webhook["clientConfig"].get("caBundle") != self._bundle:
                path = f"/webhooks/{i}/clientConfig/caBundle"
                operations.append({"op": "add", "path": path, "value": self._bundle})
        if not operations:
            return False
        version = found["metadata"]["resourceVersion"]
        operations.insert(0, {"op": "test", "path": "/metadata/resourceVersion", "value": version})
        await self._client.patch(
            _PATH, operations, "application/json-patch+json", fieldManager="mycel-controlplane"
        )
        _log.info("webhook's caBundle written", webhooks=len(operations) - 1)
        return True
