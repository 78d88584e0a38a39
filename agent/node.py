"""The node's one owner of state: the mesh as the controller tells it and the pods as the runtime attaches them.

It brings the kernel and the proxies to agree with both. Whatever changes (an update, an ADD, a DEL) is written into the state
first and brought into force by one reconciler, so that there is one order of events and sixty-four ADDs at once cost little
more than one. Who asked waits for the first pass that began after its change. What fails is tried again, and fails closed
meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from agent import api, processes
from agent.compiler import EMPTY, Tables, compile_tables
from agent.enrolment import outside
from agent.identities import Identities, IdentitiesError
from agent.live import Candidate, is_found_running
from agent.mesh import Mesh, apply, is_ipv4
from agent.namespaces import Namespaces
from agent.passage import GRACE, Passages, Stage
from agent.pods import Attachment, AttachmentKey, Pods, PodsError, Refusal, Sandbox
from agent.programmer import Outcome, PodSpec, Programmer
from agent.storage import Storage
from agent.sweeper import Sweeper
from cni import protocol
from common import logs
from common.tasks import Tasks
from controlplane.api import ResourceError, Update, Workload, decode_update, encode

_log = logs.get(__name__)

#: Seconds that an ADD waits for the controller to speak of its pod; the whole request has a little more.
WORKLOAD_TIMEOUT = 10.0
#: Seconds after a start in which the last good state may be old: a pod that is outside by it waits for the controller.
FRESH = 5.0
#: Seconds until what failed is tried again.
RETRY = 3.0

#: Seconds between looks for what ended without a word.
MAINTENANCE = 30.0

#: The UID that kubelet gives a static pod, by its manifest; the API server's have hyphens.
_STATIC_UID = re.compile(r"[0-9a-f]{32}")

MESH_FILE = "mesh.msgpack"
IDENTITIES_FILE = "identities.json"
PODS_FILE = "pods.json"


class Carriers(Protocol):
    """The proxies, as far as a node tells them of pods."""

    async def enroll(self, pod: api.Enroll) -> None: ...
    async def withdraw(self, uid: str, netns_cookie: int, *, drain: bool = False) -> None: ...


class Node:
    """See the module. All methods belong to the event loop's thread."""

    def __init__(
        self,
        name: str,
        *,
        storage: Storage,
        programmer: Programmer,
        namespaces: Namespaces,
        sweeper: Sweeper,
        boot: str,
    ) -> None:
        """``boot`` tells one boot of the machine from the next: pods do not outlive it."""
        self.name = name
        self.mesh = Mesh()
        self.tables: Tables = EMPTY
        self.numbers = Identities()
        self.pods = Pods()
        self.proxies: Carriers | None = None
        self._storage = storage
        self._programmer = programmer
        self._namespaces = namespaces
        self._sweeper = sweeper
        self._boot = boot
        self._host_netns = processes.netns_inode_of("self")
        self._tasks = Tasks()
        self._mesh_changed = asyncio.Event()
        self._fresh = asyncio.Event()
        self._dirty = asyncio.Event()
        self._waiting: list[asyncio.Future[Outcome]] = []
        #: Pods that the kernel has and the book has not: nobody knows whose they are, so nobody may connect to them.
        self._orphans: set[int] = set()
        #: ADDs under way; one that a DEL has overtaken is not in it any more.
        self._adding: dict[AttachmentKey, object] = {}
        self._told: dict[int, api.Enroll] = {}  # by netns cookie: what proxies were told
        self._passages = Passages()
        #: Pods of other nodes that came into the mesh as they run: until when they may still speak plain text, by UID.
        self._joining: dict[str, float] = {}
        self._next: asyncio.TimerHandle | None = None
        self.on_change: Callable[[], None] = lambda: None
        #: Pods that left the mesh and run on, UID by netns cookie: proxies may hold connections of theirs until they end.
        self._left: dict[int, str] = {}
        self._unsaved = asyncio.Event()
        self._saved = self.mesh
        self._last = Outcome()

    # Life

    async def start(self) -> None:
        """Load the last good state, adopt the pods that still live, bring the kernel to agree, and go on reconciling."""
        asyncio.get_running_loop().call_later(FRESH, self._fresh.set)
        self._load()
        await self._adopt()
        self._tasks.start(self._reconcile(), name="reconcile")
        self._tasks.start(self._save(), name="save mesh")
        self._tasks.start(self._maintain(), name="maintain")
        await self._settled()

    async def stop(self) -> None:
        """Leave the kernel and the proxies as they are: an agent that ends is one that is replaced."""
        await self._tasks.cancel()
        if self._next is not None:
            self._next.cancel()
        if self._saved is not self.mesh:
            self._save_mesh(self.mesh)

    @property
    def problem(self) -> str:
        """Why the node is not as it should be; empty when it is."""
        if not self.mesh.known:
            return "the controller has not said anything yet"
        if not self._last.clean:
            return self._last.text()
        return ""

    # Controller

    async def informed(self) -> None:
        """Wait until the controller has said something, to this agent or a predecessor."""
        while not self.mesh.known:
            await self._mesh_changed.wait()

    async def apply(self, update: Update) -> tuple[ResourceError, ...]:
        """Bring an update into force; gives what of it is not."""
        before = self.mesh
        self.mesh, errors = apply(self.mesh, update)
        self._note_joining(before, update)
        changed, self._mesh_changed = self._mesh_changed, asyncio.Event()
        changed.set()
        self._fresh.set()
        outcome = await self._settled()
        self.on_change()
        self._unsaved.set()
        return errors + outcome.resources

    # CNI

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
        if workload.enrolled and not any(is_ipv4(address) for address in attachment.addresses):
            raise Refusal(
                protocol.ERR_REFUSED,
                f"pod {workload.namespace}/{workload.name} is in the mesh and has no IPv4 address",
                f"addresses: {', '.join(attachment.addresses) or 'none'}",
            )
        attachment = msgspec.structs.replace(
            attachment, pod_uid=workload.uid, netns_cookie=cookie, netns_inode=inode
        )
        if workload.enrolled:
            # No process of it runs yet: nothing that could be cut off, and nothing that may pass.
            self._passages.adopt(cookie, Stage.ENROLLED, self._now())
        self._namespaces.hold(cookie, netns)
        self.pods.put(attachment)
        self._save_pods()
        outcome = await self._settled()
        reason = outcome.pods.get(cookie, "")
        if not reason and workload.enrolled and cookie not in self._programmer.programmed:
            # Another replica of the controller may know less than the one before it.
            now = self.mesh.workloads.get(workload.uid)
            reason = "the controller took back what it said of it" if now is None or now.enrolled else ""
        if reason:
            await self.delete(attachment.key)
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
        attachment = self.pods.remove(key)
        if attachment is None:
            return
        try:
            self._save_pods()
        except OSError as error:
            # A successor finds that its namespace is gone; that is no reason to keep the pod in the kernel.
            _log.error("book of pods cannot be written", folder=str(self._storage.folder), reason=str(error))
        outcome = await self._settled()
        if reason := outcome.pods.get(attachment.netns_cookie):
            raise Refusal(protocol.ERR_TRY_AGAIN, "the pod could not be removed from the kernel", reason)
        _log.info(
            "pod detached", pod=f"{attachment.pod_namespace}/{attachment.pod_name}", uid=attachment.pod_uid
        )

    async def check(self, attachment: Attachment, netns: int) -> None:
        """Look whether what ADD installed is there; changes nothing.

        :raises Refusal: something is missing.
        """
        known = self.pods.get(attachment.key)
        if known is None:
            workload = self._known(attachment)
            if attachment.pod_namespace in outside(self.mesh) and not (workload and workload.enrolled):
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
        missing = [] if known.netns_cookie not in self._told else self._programmer.missing(known.netns_cookie)
        workload = self.mesh.workloads.get(known.pod_uid)
        if workload is not None and workload.enrolled and known.netns_cookie not in self._told:
            missing.append(self._last.pods.get(known.netns_cookie, "not enrolled yet"))
        if missing:
            raise Refusal(
                protocol.ERR_TRY_AGAIN,
                f"missing for pod {known.pod_namespace}/{known.pod_name}: {', '.join(missing)}",
            )

    async def collect(self, network: str, valid: frozenset[AttachmentKey]) -> None:
        """Remove every attachment of a network that is not in ``valid``.

        :raises Refusal: some could not be removed; the others are.
        """
        failed = []
        for attachment in self.pods:
            if attachment.network == network and attachment.key not in valid:
                try:
                    await self.delete(attachment.key)
                except Refusal as refusal:
                    failed.append(
                        f"{attachment.container_id} {attachment.ifname}: {refusal.details or refusal.message}"
                    )
        if failed:
            raise Refusal(protocol.ERR_TRY_AGAIN, "not all could be removed", "; ".join(failed))

    async def status(self) -> None:
        """:raises Refusal: an ADD would fail now, and why."""
        if not self.mesh.known:
            raise Refusal(protocol.ERR_NOT_AVAILABLE, "not ready for pods", self.problem)
        if full := self._programmer.full():
            raise Refusal(protocol.ERR_NOT_AVAILABLE, "no room for another pod", f"full: {', '.join(full)}")

    def unattached(self) -> list[str]:
        """Ready pods of this node in the mesh that were never attached through the plugin (they ran before it)."""
        attached = {attachment.pod_uid for attachment in self.pods}
        return sorted(
            f"{workload.namespace}/{workload.name}"
            for workload in self.mesh.workloads.values()
            if workload.node == self.name
            and workload.enrolled
            and workload.ready
            and workload.uid not in attached
        )

    # Running pods (agent.live.Book)

    def candidates(self) -> Sequence[Candidate]:
        attached = {attachment.pod_uid for attachment in self.pods}
        return [
            Candidate(workload.uid, workload.namespace, workload.name, address)
            for workload in self.mesh.workloads.values()
            if workload.enrolled and workload.node == self.name and workload.uid not in attached
            # Without an address its sandbox is still being made, and will come by ADD.
            for address in [next(filter(is_ipv4, workload.addresses), "")]
            if address
        ]

    def found_running(self) -> Sequence[Attachment]:
        return [attachment for attachment in self.pods if is_found_running(attachment)]

    def lives(self, attachment: Attachment) -> bool:
        workload = self.mesh.workloads.get(attachment.pod_uid)
        return (
            self.pods.get(attachment.key) is not None
            and workload is not None
            and workload.node == self.name
            and attachment.addresses[0] in workload.addresses
        )

    async def attach_running(self, attachment: Attachment, netns: int) -> None:
        """Take a pod that runs already into the book; it joins stage by stage, see :mod:`agent.passage`."""
        self._namespaces.hold(attachment.netns_cookie, netns)
        self.pods.put(attachment)
        self._save_pods()
        await self._settled()
        _log.info(
            "running pod joins",
            pod=f"{attachment.pod_namespace}/{attachment.pod_name}",
            uid=attachment.pod_uid,
            addresses=",".join(attachment.addresses),
        )

    def stage(self, netns_cookie: int) -> Stage | None:
        """Where a pod is on its way into the mesh or out of it."""
        return self._passages.stage(netns_cookie)

    # Proxies (agent.proxies.Enrolled)

    def enrolled(self) -> Sequence[api.Enroll]:
        """The pods that proxies carry, without listeners."""
        return tuple(self._told.values())

    def attached(self, uid: str, netns_cookie: int) -> bool:
        return any(a.pod_uid == uid and a.netns_cookie == netns_cookie for a in self.pods)

    # Within

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
            if attachment.pod_namespace in outside(self.mesh):
                return None
            said = (
                "the controller has not said anything yet"
                if not self.mesh.known
                else "the controller does not know it"
            )
            raise Refusal(
                protocol.ERR_TRY_AGAIN,
                f"pod {attachment.pod_namespace}/{attachment.pod_name} ({uid}) is not known",
                f"{said}, {WORKLOAD_TIMEOUT:g} s long",
            ) from None
        if workload.node != self.name:
            raise Refusal(
                protocol.ERR_REFUSED,
                f"pod {uid} belongs to node {workload.node!r}",
                f"this node is {self.name!r}",
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
        workload = self.mesh.workloads.get(attachment.pod_uid)
        if workload is not None or not _STATIC_UID.fullmatch(attachment.pod_uid):
            return workload
        # The API server knows a static pod by its mirror, which has another UID and the same name.
        name = (attachment.pod_namespace, attachment.pod_name, self.name)
        return next((w for w in self.mesh.workloads.values() if (w.namespace, w.name, w.node) == name), None)

    async def _settled(self) -> Outcome:
        """Wait for the first pass that begins from now on."""
        waiter: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._dirty.set()
        return await waiter

    async def _reconcile(self) -> None:
        loop = asyncio.get_running_loop()
        retry: asyncio.TimerHandle | None = None
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            waiting, self._waiting = self._waiting, []
            if retry is not None:
                retry.cancel()
                retry = None
            try:
                outcome = await self._pass()
            except Exception as error:
                _log.exception("reconciling failed")
                reason = f"{type(error).__name__}: {error}"
                outcome = Outcome(
                    resources=(ResourceError("", reason),), pods=dict.fromkeys(self.pods.sandboxes(), reason)
                )
            if not outcome.clean:
                if outcome.text() != self._last.text():
                    _log.error("node is not as it should be", reason=outcome.text(), retry_s=RETRY)
                retry = loop.call_later(RETRY, self._dirty.set)
            elif not self._last.clean:
                _log.info("node is as it should be again")
            self._last = outcome
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(outcome)

    async def _pass(self) -> Outcome:
        """Bring the kernel and the proxies to agree with the state as it is now."""
        mesh = self.mesh
        sandboxes = self.pods.sandboxes()
        if not mesh.known:
            # Nothing is known, so nothing is changed: what a predecessor left in the kernel goes on to hold.
            return Outcome()
        attached: dict[str, tuple[str, ...]] = {}
        for sandbox in sandboxes.values():
            attached[sandbox.uid] = attached.get(sandbox.uid, ()) + sandbox.addresses
        tables = compile_tables(mesh, node=self.name, attached=attached, numbers=self.numbers)
        if self.numbers.dirty:
            self._storage.write(IDENTITIES_FILE, self.numbers.dump())
            # Not before: a number whose meaning a restart forgets must never be in the kernel.
            self.numbers.dirty = False
        unknown = {cookie for cookie, sandbox in sandboxes.items() if sandbox.uid not in mesh.workloads}
        specs = self._specs(mesh, tables, {c: s for c, s in sandboxes.items() if c not in unknown})
        self._orphans -= sandboxes.keys()
        outcome = await self._programmer.program(
            tables,
            specs,
            sealed=unknown | self._orphans,
            joining=self._still_joining(),
            left=sandboxes.keys() - specs.keys(),
        )
        self.tables = tables
        self._plan({cookie for cookie, spec in specs.items() if spec.leaving})
        if outcome.verdicts_changed:
            self._tasks.start(self._sweeper.sweep(), name="sweep")
        await self._tell(mesh, {cookie: sandboxes[cookie] for cookie in specs if cookie not in outcome.pods})
        # After DEL nothing here keeps a namespace alive; one that cannot be undone in the kernel is still needed.
        self._namespaces.release_others(self.pods.sandboxes().keys() | outcome.pods.keys())
        return outcome

    def _specs(self, mesh: Mesh, tables: Tables, sandboxes: Mapping[int, Sandbox]) -> dict[int, PodSpec]:
        """The pods that the kernel is to have, each at its stage."""
        now = self._now()
        self._passages.keep(self.pods.sandboxes().keys() | self._orphans)
        kinds = [api.ListenerKind.OUTBOUND, api.ListenerKind.HBONE]
        if any(service.l7 for service in tables.services.values()):
            kinds.append(api.ListenerKind.OUTBOUND_L7)
        specs: dict[int, PodSpec] = {}
        for cookie, sandbox in sandboxes.items():
            enrolled = self._is_enrolled(mesh, sandbox)
            address = _first_ipv4(sandbox)
            stage: Stage | None
            if enrolled:
                reachable = self._passages.stage(cookie) is not Stage.PREPARED or all(
                    self._programmer.has_listener(address, kind.port) for kind in kinds
                )
                stage = self._passages.join(cookie, running=True, reachable=reachable, now=now)
            else:
                stage = self._passages.leave(cookie, now)
            if stage is not None:
                number = tables.identities.get(sandbox.uid, 0)
                specs[cookie] = PodSpec(sandbox.uid, cookie, address, number, stage, leaving=not enrolled)
        return specs

    def _plan(self, leaving: Collection[int]) -> None:
        """Come back when the next stage of a pod is due."""
        loop = asyncio.get_running_loop()
        if self._next is not None:
            self._next.cancel()
        waits = [until - self._now() for until in self._joining.values()]
        if (stage := self._passages.next(leaving=leaving, now=self._now())) is not None:
            waits.append(stage)
        self._next = loop.call_later(max(0.0, min(waits)), self._dirty.set) if waits else None

    def _note_joining(self, before: Mesh, update: Update) -> None:
        until = self._now() + GRACE
        for resource in update.upserts:
            if isinstance(resource, Workload) and resource.enrolled:
                known = before.workloads.get(resource.uid)
                # To whom all is new, all may be new: the mesh itself may be younger than its pods.
                if not before.known or (known is not None and not known.enrolled):
                    self._joining[resource.uid] = until

    def _still_joining(self) -> Collection[str]:
        now = self._now()
        self._joining = {uid: until for uid, until in self._joining.items() if until > now}
        return self._joining.keys()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _is_enrolled(self, mesh: Mesh, sandbox: Sandbox) -> bool:
        workload = mesh.workloads.get(sandbox.uid)
        return workload is not None and workload.enrolled and _first_ipv4(sandbox) != ""

    async def _tell(self, mesh: Mesh, enrolled: Mapping[int, Sandbox]) -> None:
        """Tell the proxies what has changed since they were told last."""
        attached = self.pods.sandboxes()
        for cookie in self._left.keys() - attached.keys():
            uid = self._left.pop(cookie)
            if self.proxies is not None:
                await self.proxies.withdraw(uid, cookie)
        for cookie in [cookie for cookie in self._told if cookie not in enrolled]:
            pod = self._told.pop(cookie)
            runs_on = cookie in attached and pod.uid in mesh.workloads
            if runs_on:
                self._left[cookie] = pod.uid
            if self.proxies is not None:
                await self.proxies.withdraw(pod.uid, cookie, drain=runs_on)
        for cookie, sandbox in enrolled.items():
            workload = mesh.workloads[sandbox.uid]
            pod = api.Enroll(
                uid=workload.uid,
                netns_cookie=cookie,
                address=_first_ipv4(sandbox),
                namespace=workload.namespace,
                name=workload.name,
                service_account=workload.service_account,
                identity=workload.identity,
                workload_name=workload.workload_name,
                app=workload.app,
                version=workload.version,
            )
            if self._told.get(cookie) != pod:
                self._told[cookie] = pod
                if self.proxies is not None:
                    await self.proxies.enroll(pod)

    def _load(self) -> None:
        if (data := self._storage.read(IDENTITIES_FILE)) is not None:
            try:
                self.numbers = Identities.load(data)
            except IdentitiesError as error:
                self._storage.set_aside(IDENTITIES_FILE, str(error))
                data = None
        if data is None and self._programmer.programmed:
            # Numbers of a predecessor are in the kernel, and nobody knows whose they are: none of them may come again.
            self.numbers = Identities(first=int(time.time()))
        if (data := self._storage.read(MESH_FILE)) is not None:
            try:
                self.mesh, errors = apply(Mesh(), decode_update(data))
            except msgspec.DecodeError as error:
                self._storage.set_aside(MESH_FILE, str(error))
            else:
                for bad in errors:
                    _log.error("last good state is not all good", resource=bad.key, reason=bad.reason)
                _log.info(
                    "last good state loaded",
                    version=self.mesh.version[:12],
                    resources=len(self.mesh.resources),
                )
        if (data := self._storage.read(PODS_FILE)) is not None:
            try:
                book = msgspec.json.decode(data, type=_PodsFile)
                if book.boot == self._boot:
                    self.pods = Pods.load(bytes(book.pods))
            except (msgspec.DecodeError, PodsError) as error:
                self._storage.set_aside(PODS_FILE, str(error))

    async def _adopt(self) -> None:
        """Find the namespaces of the pods that a predecessor attached; forget the pods that have gone meanwhile."""
        living = self._programmer.living()
        changed = False
        for attachment in self.pods:
            name = f"{attachment.pod_namespace}/{attachment.pod_name}"
            path = Path(attachment.netns_path)
            if await self._namespaces.find(attachment.netns_cookie, attachment.netns_inode, path):
                continue
            if attachment.netns_cookie in living:
                # It runs, captured and judged as it was, but no socket can be made in it.
                _log.error(
                    "namespace of a pod is not to be seen from here", pod=name, path=attachment.netns_path
                )
                continue
            _log.info("pod has gone while no agent ran", pod=name)
            self.pods.remove(attachment.key)
            changed = True
        if changed:
            self._save_pods()
        for cookie, stage in self._programmer.stages().items():
            self._passages.adopt(cookie, stage, self._now())
        for cookie, sandbox in self.pods.sandboxes().items():
            if self._passages.stage(cookie) is not None:
                continue
            if self._is_enrolled(self.mesh, sandbox):
                # It was enrolled, and the kernel has lost it: there is no way in by stages that it could take.
                self._passages.adopt(cookie, Stage.ENROLLED, self._now())
            else:
                self._left[cookie] = sandbox.uid
        joining = self._programmer.joining()
        for workload in self.mesh.workloads.values():
            if not joining.isdisjoint(workload.addresses):
                self._joining[workload.uid] = self._now() + GRACE
        self._orphans = set(living - self.pods.sandboxes().keys())
        if self._orphans:
            _log.error(
                "pods of an unknown attachment are sealed until they end", namespaces=sorted(self._orphans)
            )

    async def _maintain(self) -> None:
        """From time to time look for what ended without a word: a runtime that was killed sends no DEL."""
        while True:
            await asyncio.sleep(MAINTENANCE)
            try:
                if self._orphans and (gone := self._orphans - self._programmer.living()):
                    self._orphans -= gone
                    self._dirty.set()
                self._programmer.forget_accounts(set(self.tables.identities.values()))
            except OSError as error:
                _log.error("kernel cannot be looked at", reason=str(error))

    def _save_pods(self) -> None:
        self._storage.write(
            PODS_FILE, msgspec.json.encode(_PodsFile(self._boot, msgspec.Raw(self.pods.dump())))
        )

    async def _save(self) -> None:
        """Keep the last good state on disk; the file is large and may be a few changes behind, never torn."""
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            try:
                await asyncio.to_thread(self._save_mesh, self.mesh)
            except OSError as error:
                _log.error(
                    "last good state cannot be written", folder=str(self._storage.folder), reason=str(error)
                )
            await asyncio.sleep(0.2)

    def _save_mesh(self, mesh: Mesh) -> None:
        self._storage.write(MESH_FILE, encode(mesh.snapshot()))
        self._saved = mesh


class _PodsFile(msgspec.Struct):
    boot: str
    pods: msgspec.Raw


def _first_ipv4(sandbox: Sandbox) -> str:
    return next((address for address in sandbox.addresses if is_ipv4(address)), "")
