"""The Sign call: which node asks, does the pod live there, and what is it called.

A node gets certificates for its own pods only, as the current snapshot sees them, and for none that can never be in the mesh:
nobody needs those but who has stolen a node's token. Names come from the snapshot, never from the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import grpc
import grpc.aio
import msgspec
from prometheus_client import CollectorRegistry, Counter

from common import logs, spiffe
from controlplane import api
from controlplane.ca.authority import Authority, RequestError, utc_now
from controlplane.credentials import Gate, Right
from controlplane.publisher import Publisher

_log = logs.get(__name__)


class CertificateService:
    """Serves :data:`controlplane.api.METHOD_SIGN`."""

    def __init__(
        self,
        authority: Authority,
        publisher: Publisher,
        gate: Gate,
        registry: CollectorRegistry,
        never_enrolled: Callable[[api.Workload], bool],
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """``never_enrolled``: True for a pod that stays outside of the mesh whatever its labels come to say."""
        self._authority = authority
        self._publisher = publisher
        self._gate = gate
        self._never_enrolled = never_enrolled
        self._clock = clock
        self._issued = Counter(
            "mycel_ca_certificates_issued", "Workload certificates signed.", ["node"], registry=registry
        )
        self._refused = Counter(
            "mycel_ca_requests_refused",
            "Requests for a certificate that were refused.",
            ["code"],
            registry=registry,
        )

    async def sign(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        """One certificate, or the call ends with the codes that :data:`controlplane.api.METHOD_SIGN` lists."""
        node = (await self._gate.admit(context, Right.SIGN)).node
        try:
            message = api.decode_sign_request(request)
        except msgspec.DecodeError as e:
            return await self._refuse(
                context, node, "", grpc.StatusCode.INVALID_ARGUMENT, f"no SignRequest: {e}"
            )
        workload = self._publisher.snapshot.workloads.get(message.uid)
        if workload is None or workload.node != node:
            # One answer for both: a node learns nothing about other nodes' pods.
            reason = f"no live pod of UID {message.uid} on node {node}"
            return await self._refuse(context, node, message.uid, grpc.StatusCode.PERMISSION_DENIED, reason)
        if self._never_enrolled(workload):
            reason = f"the pod of UID {message.uid} is never in the mesh"
            return await self._refuse(context, node, message.uid, grpc.StatusCode.PERMISSION_DENIED, reason)
        identity = spiffe.parse(workload.identity)
        try:
            issued = self._authority.issue_workload(message.csr, identity, self._clock())
        except RequestError as e:
            code = grpc.StatusCode.PERMISSION_DENIED if e.forbidden else grpc.StatusCode.INVALID_ARGUMENT
            return await self._refuse(context, node, message.uid, code, f"the request {e}")
        self._issued.labels(node).inc()
        _log.info(
            "certificate issued",
            node=node,
            uid=message.uid,
            identity=workload.identity,
            serial=f"{issued.serial:x}",
            not_after=issued.not_after,
        )
        return api.encode(
            api.SignResponse((issued.certificate,), self._authority.roots, int(issued.not_after.timestamp()))
        )

    async def _refuse(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        node: str,
        uid: str,
        code: grpc.StatusCode,
        reason: str,
    ) -> bytes:
        self._refused.labels(code.name).inc()
        _log.warning("certificate refused", node=node, uid=uid, code=code.name, reason=reason)
        await context.abort(code, reason)
        raise AssertionError("abort() returns never")
