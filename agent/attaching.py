"""What a CNI request does to the node: ADD, DEL, CHECK, GC and STATUS.

Owns which requests are refused and why, and whom an ADD waits for. It writes into the state and waits for the reconciler; the
protocol and its time limits are :mod:`agent.cni_service`'s.
"""

from __future__ import annotations

import asyncio
import os
import re

import msgspec

from agent import processes
from agent.enrolment import outside
from agent.mesh import one_of_each_family
from agent.namespaces import Namespaces
from agent.pods import Attachment, AttachmentKey, Refusal
from agent.programmer import Programmer
from agent.reconciler import Reconciler
from agent.state import State
from cni import protocol
from common import logs
from controlplane.api import Workload

_log = logs.get(__name__)

#: Seconds that an ADD waits for the controller to speak of its pod; the whole request has a little more.
WORKLOAD_TIMEOUT = 10.0
#: Seconds after a start in which the last good state may be old: a pod that is outside by it waits for the controller.
FRESH = 5.0

#: The UID that kubelet gives a static pod, by its manifest; the API server's have hyphens.
_STATIC_UID = re.compile(r"[0-9a-f]{32}")


class Attaching:
    """See the module. All methods belong to the event loop's thread."""

    def __init__(
        self,
        name: str,
        state: State,
        *,
        reconciler: Reconciler,
        programmer: Programmer,
        namespaces: Namespaces,
    ) -> None:
        """``name`` is the node's."""
        self._name = name
        self._state = state
        self._reconciler = reconciler
        self._programmer = programmer
        self._namespaces = namespaces
        self._host_netns = processes.netns_inode_of("self")
        self._mesh_changed = asyncio.Event()
        self._fresh = asyncio.Event()
        #: ADDs under way; one that a DEL has overtaken is not in it any more.
        self._adding: dict[AttachmentKey, object] = {}

    def started(self) -> None:
        """The last good state is there; the controller has not spoken yet."""
        asyncio.get_running_loop().call_later(FRESH, self._fresh.set)

    def told(self) -> None:
        """The controller has spoken: whoever waits looks again."""
        changed, self._mesh_changed = self._mesh_changed, asyncio.Event()
        changed.set()
        self._fresh.set()

    async def informed(self) -> None:
        """Wait until the controller has said something, to this agent or a predecessor."""
        while not self._state.mesh.known:
            await self._mesh_changed.wait()

    async def add(self, attachment: Attachment, netns: int) -> None:
        """Attach a pod; on return the kernel enforces what the mesh says of it.

        One that the controller does not speak of passes in a namespace that is outside: no controller may answer for long, and it
        joins as it runs if it should be in the mesh.

        :param netns: its network namespace, still the caller's.
        :raises Refusal: it is not attached.
        """
        this = self._adding[attachment.key] = object()
        try:
            cookie, inode = await self._look_at(attachment, netns)
            workload = await self._workload(attachment)
            if self._adding.get(attachment.key) is not this:
                # Its runtime gave it up. Attached now, nobody would ever remove it.
                raise Refusal(protocol.ERR_TRY_AGAIN, "the pod was removed while it was being added")
        finally:
            if self._adding.get(attachment.key) is this:
                del self._adding[attachment.key]
        if workload is None:
            _log.warning(
                "pod of a namespace outside starts unknown: no word of it from the controller",
                pod=f"{attachment.pod_namespace}/{attachment.pod_name}",
                uid=attachment.pod_uid,
            )
            return
        if workload.enrolled and not one_of_each_family(attachment.addresses):
            raise Refusal(
                protocol.ERR_REFUSED,
                f"pod {workload.namespace}/{workload.name} is in the mesh and has no address",
                f"addresses: {', '.join(attachment.addresses) or 'none'}",
            )
        attachment = msgspec.structs.replace(
            attachment, pod_uid=workload.uid, netns_cookie=cookie, netns_inode=inode
        )
        try:
            self._state.book(attachment)
        except OSError as error:
            # A successor would not know whose the pod is.
            raise Refusal(protocol.ERR_TRY_AGAIN, "the book of pods cannot be written", str(error)) from None
        if workload.enrolled:
            self._reconciler.attached_before_it_runs(cookie)
        self._namespaces.hold(cookie, netns)
        outcome = await self._reconciler.settled()
        reason = outcome.pods.get(cookie, "")
        if not reason and workload.enrolled and cookie not in self._programmer.programmed:
            # Another replica of the controller may know less than the one before it.
            now = self._state.mesh.workloads.get(workload.uid)
            reason = "the controller took back what it said of it" if now is None or now.enrolled else ""
        if reason:
            await self.delete(attachment.key)
            if cookie in outcome.hopeless:
                raise Refusal(
                    protocol.ERR_REFUSED,
                    f"pod {workload.namespace}/{workload.name} cannot be in the mesh: it has no veth to its node",
                    reason,
                )
            raise Refusal(protocol.ERR_TRY_AGAIN, "the kernel could not be programmed for the pod", reason)
        _log.info(
            "pod attached",
            pod=f"{workload.namespace}/{workload.name}",
            uid=workload.uid,
            addresses=",".join(attachment.addresses),
            enrolled=workload.enrolled,
        )

    async def delete(self, key: AttachmentKey) -> None:
        """Undo an ADD, if there was one.

        :raises Refusal: something of it is still there; it will be tried again.
        """
        self._adding.pop(key, None)
        attachment = self._state.pods.remove(key)
        if attachment is None:
            return
        try:
            self._state.save_pods()
        except OSError as error:
            # A successor finds that its namespace is gone; that is no reason to keep the pod in the kernel.
            _log.error("book of pods cannot be written", folder=self._state.folder, reason=str(error))
        outcome = await self._reconciler.settled()
        if reason := outcome.pods.get(attachment.netns_cookie):
            raise Refusal(protocol.ERR_TRY_AGAIN, "the pod could not be removed from the kernel", reason)
        _log.info(
            "pod detached", pod=f"{attachment.pod_namespace}/{attachment.pod_name}", uid=attachment.pod_uid
        )

    async def check(self, attachment: Attachment, netns: int) -> None:
        """Look whether what ADD installed is there; changes nothing.

        :raises Refusal: something is missing.
        """
        known = self._state.pods.get(attachment.key)
        if known is None:
            workload = self._known(attachment)
            if attachment.pod_namespace in outside(self._state.mesh) and not (workload and workload.enrolled):
                return  # it started while no agent or controller answered: nothing of ours is in it
            raise Refusal(
                protocol.ERR_UNKNOWN_CONTAINER,
                f"{attachment.container_id} {attachment.ifname} was never added",
            )
        if os.fstat(netns).st_ino != known.netns_inode:
            raise Refusal(
                protocol.ERR_INVALID_ENVIRONMENT,
                f"CNI_NETNS: {attachment.netns_path} is not the namespace of ADD",
            )
        missing = (
            []
            if known.netns_cookie not in self._reconciler.told
            else self._programmer.missing(known.netns_cookie)
        )
        workload = self._state.mesh.workloads.get(known.pod_uid)
        if workload is not None and workload.enrolled and known.netns_cookie not in self._reconciler.told:
            missing.append(self._reconciler.last.pods.get(known.netns_cookie, "not enrolled yet"))
        if missing:
            raise Refusal(
                protocol.ERR_TRY_AGAIN,
                f"missing for pod {known.pod_namespace}/{known.pod_name}: {', '.join(missing)}",
            )

    async def collect(self, network: str, valid: frozenset[AttachmentKey]) -> None:
        """Remove every attachment of a network that is not in ``valid``.

        :raises Refusal: some could not be removed; the others are.
        """
        stale = [a for a in self._state.pods if a.network == network and a.key not in valid]
        # At once: one after the other, each would wait for a pass of its own, and many for longer than a request may take.
        outcomes = await asyncio.gather(*(self.delete(a.key) for a in stale), return_exceptions=True)
        failed = []
        for attachment, outcome in zip(stale, outcomes, strict=True):
            if isinstance(outcome, Refusal):
                failed.append(
                    f"{attachment.container_id} {attachment.ifname}: {outcome.details or outcome.message}"
                )
            elif outcome is not None:
                raise outcome
        if failed:
            raise Refusal(protocol.ERR_TRY_AGAIN, "not all could be removed", "; ".join(failed))

    async def status(self) -> None:
        """:raises Refusal: an ADD would fail now, and why."""
        if not self._state.mesh.known:
            raise Refusal(
                protocol.ERR_NOT_AVAILABLE, "not ready for pods", "the controller has not said anything yet"
            )
        if full := self._programmer.full():
            raise Refusal(protocol.ERR_NOT_AVAILABLE, "no room for another pod", f"full: {', '.join(full)}")

    async def _look_at(self, attachment: Attachment, netns: int) -> tuple[int, int]:
        inode = os.fstat(netns).st_ino
        if inode == self._host_netns:
            raise Refusal(
                protocol.ERR_INVALID_ENVIRONMENT, "CNI_NETNS: this is the node's own namespace, not a pod's"
            )
        try:
            cookie, interfaces = await self._namespaces.look(netns)
        except OSError as error:
            raise Refusal(
                protocol.ERR_INVALID_ENVIRONMENT,
                f"CNI_NETNS: {attachment.netns_path} cannot be entered",
                str(error),
            ) from None
        if attachment.ifname not in interfaces:
            raise Refusal(
                protocol.ERR_INVALID_ENVIRONMENT,
                f"CNI_IFNAME: the pod has no interface {attachment.ifname}",
                f"it has {', '.join(interfaces)}",
            )
        return cookie, inode

    async def _workload(self, attachment: Attachment) -> Workload | None:
        """The workload of a pod, waiting for the controller to speak of it; None if it does not and the namespace is outside.

        :raises Refusal: it does not, or speaks of another.
        """
        uid = attachment.pod_uid
        if not uid:
            raise Refusal(protocol.ERR_REFUSED, "pod cannot be identified: it has no UID")
        try:
            async with asyncio.timeout(WORKLOAD_TIMEOUT):
                while (workload := self._known(attachment)) is None:
                    await self._mesh_changed.wait()
                if not workload.enrolled:
                    # Its namespace may have been labelled while this node was off.
                    await self._fresh.wait()
                    workload = self._known(attachment) or workload
        except TimeoutError:
            if attachment.pod_namespace in outside(self._state.mesh):
                return None
            said = (
                "the controller has not said anything yet"
                if not self._state.mesh.known
                else "the controller does not know it"
            )
            raise Refusal(
                protocol.ERR_TRY_AGAIN,
                f"pod {attachment.pod_namespace}/{attachment.pod_name} ({uid}) is not known",
                f"{said}, {WORKLOAD_TIMEOUT:g} s long",
            ) from None
        if workload.node != self._name:
            raise Refusal(
                protocol.ERR_REFUSED,
                f"pod {uid} belongs to node {workload.node!r}",
                f"this node is {self._name!r}",
            )
        for field, given, known in (
            ("K8S_POD_NAMESPACE", attachment.pod_namespace, workload.namespace),
            ("K8S_POD_NAME", attachment.pod_name, workload.name),
        ):
            if given and given != known:
                raise Refusal(
                    protocol.ERR_REFUSED, f"CNI_ARGS: {field} is {given!r}, but pod {uid} has {known!r}"
                )
        return workload

    def _known(self, attachment: Attachment) -> Workload | None:
        workload = self._state.mesh.workloads.get(attachment.pod_uid)
        if workload is not None or not _STATIC_UID.fullmatch(attachment.pod_uid):
            return workload
        # The API server knows a static pod by its mirror, which has another UID and the same name.
        name = (attachment.pod_namespace, attachment.pod_name, self._name)
        return next(
            (w for w in self._state.mesh.workloads.values() if (w.namespace, w.name, w.node) == name), None
        )
