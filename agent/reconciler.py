"""Brings the kernel and the proxies to agree with what the node knows (:mod:`agent.state`).

Owns the one order of events: whatever changes is written into the state first and brought into force by one pass at a time, so
that sixty-four ADDs at once cost little more than one. Who asked waits for the first pass that began after its change. What fails
is tried again, and fails closed meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

from agent import api
from agent.compiler import EMPTY, Tables, compile_tables
from agent.identities import label_of
from agent.mesh import Mesh, one_of_each_family
from agent.namespaces import Namespaces
from agent.passage import GRACE, Passages, Stage
from agent.pods import Sandbox
from agent.programmer import Outcome, PodSpec, Programmer
from agent.state import State
from agent.sweeper import Sweeper
from common import logs
from common.tasks import Tasks
from controlplane.api import ResourceError, Update, Workload

_log = logs.get(__name__)

#: Seconds until what failed is tried again.
RETRY = 3.0

#: Seconds between comparisons of the kernel with what was written into it, and how many it takes until everything was compared.
COMPARE = 15.0
PARTS = 4

#: Seconds after which a pod of an ADD has started: what takes long in the kernel disturbs it no more.
STARTED = 1.0

#: Seconds that a workload is gone before its number may be forgotten.
FORGET = 300.0

#: Seconds between looks for what ended without a word.
MAINTENANCE = 30.0


class Carriers(Protocol):
    """The proxies, as far as a node tells them of pods."""

    async def enroll(self, pod: api.Enroll) -> None: ...
    async def withdraw(self, uid: str, netns_cookie: int, *, drain: bool = False) -> None: ...


class Reconciler:
    """See the module. All methods belong to the event loop's thread."""

    def __init__(
        self,
        name: str,
        state: State,
        *,
        programmer: Programmer,
        namespaces: Namespaces,
        sweeper: Sweeper,
    ) -> None:
        """``name`` is the node's."""
        self.tables: Tables = EMPTY
        self.passages = Passages()
        self.proxies: Carriers | None = None
        self.told: dict[int, api.Enroll] = {}  #: by netns cookie: what proxies were told
        #: (UID, netns cookie) of pods that ended while no agent ran: proxies may still have some of theirs.
        self.ended: list[tuple[str, int]] = []
        self.last = Outcome()
        self._name = name
        self._state = state
        self._programmer = programmer
        self._namespaces = namespaces
        self._sweeper = sweeper
        self._tasks = Tasks()
        #: What the kernel had lost or changed, and was written again, by what it is.
        self.repairs: Counter[str] = Counter()
        #: The loader: puts programs back at the node's cgroup.
        self.load: Callable[[], Awaitable[None]] = _nothing
        #: Gives cgroups their roles again where the kernel has lost them; how many those were.
        self.give_roles: Callable[[], int] = lambda: 0
        self._look_now = asyncio.Event()
        #: Numbers of no workload, and since when.
        self._unused: dict[int, float] = {}
        self._turn = 0
        #: The kernel is written into by one pass, or looked at.
        self._passing = asyncio.Lock()
        self._dirty = asyncio.Event()
        self._waiting: list[asyncio.Future[Outcome]] = []
        #: Pods that the kernel has and the book has not: nobody knows whose they are, so nobody may connect to them.
        self._orphans: set[int] = set()
        #: Pods of other nodes that came into the mesh as they run: until when they may still speak plain text, by UID.
        self._joining: dict[str, float] = {}
        #: Pods of other nodes that left the mesh and run on: until when they are dialled by it, by UID.
        self._lingering: dict[str, float] = {}
        self._next: asyncio.TimerHandle | None = None
        #: Pods of ADDs that nobody has programmed yet, by netns cookie.
        self._starting: set[int] = set()
        self._to_link = asyncio.Event()
        #: Pods that left the mesh and run on, UID by netns cookie: proxies may hold connections of theirs until they end.
        self._left: dict[int, str] = {}

    async def start(self) -> None:
        """Adopt the pods that still live, bring the kernel to agree, and go on."""
        await self._adopt()
        self._tasks.start(self._reconcile(), name="reconcile")
        self._tasks.start(self._maintain(), name="maintain")
        self._tasks.start(self._compare(), name="compare with the kernel")
        self._tasks.start(self._link(), name="link")
        await self.settled()

    async def stop(self) -> None:
        """Leave the kernel and the proxies as they are."""
        await self._tasks.cancel()
        if self._next is not None:
            self._next.cancel()

    def attached_before_it_runs(self, cookie: int) -> None:
        """The pod of an ADD has no process yet: nothing that could be cut off, and nothing that may pass."""
        self.passages.adopt(cookie, Stage.ENROLLED, self._now())
        self._starting.add(cookie)

    async def settled(self) -> Outcome:
        """Wait for the first pass that begins from now on."""
        waiter: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._dirty.set()
        return await waiter

    def note_passages(self, before: Mesh, update: Update) -> None:
        """The update is to be brought into force: who may speak plain text for a while, and who is dialled by the mesh still."""
        now = self._now()
        for resource in update.upserts:
            if not isinstance(resource, Workload):
                continue
            known = before.workloads.get(resource.uid)
            if resource.enrolled:
                self._lingering.pop(resource.uid, None)
                # To whom all is new, all may be new: the mesh itself may be younger than its pods.
                if not before.known or (known is not None and not known.enrolled):
                    self._joining[resource.uid] = now + GRACE
            elif known is not None and known.enrolled:
                self._joining.pop(resource.uid, None)
                if resource.node != self._name:
                    self._lingering[resource.uid] = now + api.LINGER

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
                async with self._passing:
                    outcome = await self._pass()
            except Exception as error:
                _log.exception("reconciling failed")
                reason = f"{type(error).__name__}: {error}"
                outcome = Outcome(
                    resources=(ResourceError("", reason),),
                    pods=dict.fromkeys(self._state.pods.sandboxes(), reason),
                )
            if not outcome.clean:
                if outcome.text() != self.last.text():
                    _log.error("node is not as it should be", reason=outcome.text(), retry_s=RETRY)
                retry = loop.call_later(RETRY, self._dirty.set)
            elif not self.last.clean:
                _log.info("node is as it should be again")
            self.last = outcome
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(outcome)

    async def _pass(self) -> Outcome:
        """Bring the kernel and the proxies to agree with the state as it is now."""
        mesh = self._state.mesh
        sandboxes = self._state.pods.sandboxes()
        if not mesh.known:
            # Nothing is known, so nothing is changed: what a predecessor left in the kernel goes on to hold.
            return Outcome()
        attached: dict[str, tuple[str, ...]] = {}
        for sandbox in sandboxes.values():
            attached[sandbox.uid] = attached.get(sandbox.uid, ()) + sandbox.addresses
        tables = compile_tables(
            mesh,
            node=self._name,
            attached=attached,
            numbers=self._state.numbers,
            host=self._programmer.host_addresses(),
            lingering=self._still(self._lingering),
            before=self.tables,
        )
        self._state.save_numbers()
        unknown = {cookie for cookie, sandbox in sandboxes.items() if sandbox.uid not in mesh.workloads}
        specs = self._specs(mesh, tables, {c: s for c, s in sandboxes.items() if c not in unknown})
        self._orphans -= sandboxes.keys()
        outcome = await self._programmer.program(
            tables,
            specs,
            sealed=unknown | self._orphans,
            joining=self._still(self._joining),
            left=sandboxes.keys() - specs.keys(),
        )
        self.tables = tables
        # Others may have come while this one was under way.
        self._starting -= sandboxes.keys() - outcome.pods.keys()
        self._starting &= self._state.pods.sandboxes().keys()
        if self._programmer.unlinked:
            self._to_link.set()
        self._plan(specs)
        if outcome.verdicts_changed:
            self._tasks.start(self._sweeper.sweep(), name="sweep")
        await self._tell(mesh, {cookie: sandboxes[cookie] for cookie in specs if cookie not in outcome.pods})
        # After DEL nothing here keeps a namespace alive; one that cannot be undone in the kernel is still needed.
        self._namespaces.release_others(self._state.pods.sandboxes().keys() | outcome.pods.keys())
        return outcome

    def _specs(self, mesh: Mesh, tables: Tables, sandboxes: Mapping[int, Sandbox]) -> dict[int, PodSpec]:
        """The pods that the kernel is to have, each at its stage."""
        now = self._now()
        self.passages.keep(self._state.pods.sandboxes().keys() | self._orphans)
        kinds = _kinds(tables)
        specs: dict[int, PodSpec] = {}
        for cookie, sandbox in sandboxes.items():
            enrolled = self._is_enrolled(mesh, sandbox)
            addresses = one_of_each_family(sandbox.addresses)
            stage: Stage | None
            if enrolled:
                reachable = self.passages.stage(cookie) is not Stage.PREPARED or all(
                    self._programmer.has_listener(address, kind.port)
                    for kind in kinds
                    for address in addresses
                )
                stage = self.passages.join(cookie, running=True, reachable=reachable, now=now)
            else:
                stage = self.passages.leave(cookie, now)
            if stage is not None:
                number = tables.identities.get(sandbox.uid, 0)
                workload = mesh.workloads.get(sandbox.uid)
                zone = self._state.numbers.zone(workload.zone) if workload is not None else 0
                specs[cookie] = PodSpec(
                    sandbox.uid,
                    cookie,
                    addresses,
                    number,
                    stage,
                    leaving=not enrolled,
                    zone=zone,
                    splice=workload is None or workload.splice,
                    starting=cookie in self._starting,
                )
        return specs

    def _plan(self, cookies: Collection[int]) -> None:
        """Come back when the next stage of one of these pods is due."""
        loop = asyncio.get_running_loop()
        if self._next is not None:
            self._next.cancel()
        waits = [until - self._now() for until in (*self._joining.values(), *self._lingering.values())]
        if (stage := self.passages.next(cookies, self._now())) is not None:
            waits.append(stage)
        self._next = loop.call_later(max(0.0, min(waits)), self._dirty.set) if waits else None

    def _still(self, passages: dict[str, float]) -> Collection[str]:
        """Of those whose time ends the ones whose time has not."""
        now = self._now()
        for uid in [uid for uid, until in passages.items() if until <= now]:
            del passages[uid]
        return frozenset(passages)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _is_enrolled(self, mesh: Mesh, sandbox: Sandbox) -> bool:
        workload = mesh.workloads.get(sandbox.uid)
        return workload is not None and workload.enrolled and bool(one_of_each_family(sandbox.addresses))

    async def _tell(self, mesh: Mesh, enrolled: Mapping[int, Sandbox]) -> None:
        """Tell the proxies what has changed since they were told last."""
        attached = self._state.pods.sandboxes()
        for cookie in self._left.keys() - attached.keys():
            uid = self._left.pop(cookie)
            if self.proxies is not None:
                await self.proxies.withdraw(uid, cookie)
        for cookie in [cookie for cookie in self.told if cookie not in enrolled]:
            pod = self.told.pop(cookie)
            runs_on = cookie in attached and pod.uid in mesh.workloads
            if runs_on:
                self._left[cookie] = pod.uid
            if self.proxies is not None:
                await self.proxies.withdraw(pod.uid, cookie, drain=runs_on)
        for cookie, sandbox in enrolled.items():
            workload = mesh.workloads[sandbox.uid]
            addresses = one_of_each_family(sandbox.addresses)
            pod = api.Enroll(
                uid=workload.uid,
                netns_cookie=cookie,
                address=addresses[0],
                addresses=addresses,
                namespace=workload.namespace,
                name=workload.name,
                service_account=workload.service_account,
                identity=workload.identity,
                workload_name=workload.workload_name,
                app=workload.app,
                version=workload.version,
            )
            if self.told.get(cookie) != pod:
                self.told[cookie] = pod
                if self.proxies is not None:
                    await self.proxies.enroll(pod)

    async def _adopt(self) -> None:
        """Find the namespaces of the pods that a predecessor attached; forget the pods that have gone meanwhile."""
        living = self._programmer.living()
        changed = False
        for attachment in self._state.pods:
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
            self.ended.append((attachment.pod_uid, attachment.netns_cookie))
            self._state.pods.remove(attachment.key)
            changed = True
        if changed:
            self._state.save_pods()
        for cookie, stage in self._programmer.stages().items():
            self.passages.adopt(cookie, stage, self._now())
        for cookie, sandbox in self._state.pods.sandboxes().items():
            if self.passages.stage(cookie) is not None:
                continue
            if self._is_enrolled(self._state.mesh, sandbox):
                # It was enrolled, and the kernel has lost it: there is no way in by stages that it could take.
                self.passages.adopt(cookie, Stage.ENROLLED, self._now())
            else:
                self._left[cookie] = sandbox.uid
        joining = self._programmer.joining()
        for workload in self._state.mesh.workloads.values():
            if not joining.isdisjoint(workload.addresses):
                if workload.enrolled:
                    self._joining[workload.uid] = self._now() + GRACE
                elif workload.node != self._name:
                    self._lingering[workload.uid] = self._now() + api.LINGER
        self._orphans = set(living - self._state.pods.sandboxes().keys())
        if self._orphans:
            _log.error(
                "pods of an unknown attachment are sealed until they end", namespaces=sorted(self._orphans)
            )

    def look(self) -> None:
        """Compare the kernel with what was written into it now, all of it."""
        self._look_now.set()

    async def _look(self, share: int) -> None:
        """Compare one part of ``share``; what is not as it was written is so again after the next pass."""
        cookies = sorted(self._state.pods.sandboxes())
        services = self._programmer.services()
        part = slice(self._turn % share, None, share)
        self._turn += 1
        found = await self._programmer.audit(cookies[part], services[part])
        self.repairs.update(found)
        if found:
            self._dirty.set()
        # Here, not in a thread: roles are given and taken by this one.
        if lost := self.give_roles():
            self.repairs["role"] += lost
        if detached := await asyncio.to_thread(self._programmer.detached):
            _log.warning("kernel state is not as it was written: repaired", what="link", which=detached)
            await self.load()
            self.repairs["link"] += len(detached)

    async def _hand_listeners(self) -> None:
        """A listener that the kernel has lost: whoever has to hold it gets another."""
        if self.proxies is None:
            return
        kinds = _kinds(self.tables)
        for pod in tuple(self.told.values()):
            lost = [
                (address, kind)
                for kind in kinds
                for address in pod.addresses or (pod.address,)
                if not self._programmer.has_listener(address, kind.port)
            ]
            if not lost:
                continue
            await self.proxies.enroll(pod)
            # Without a proxy there is none, and nothing was lost.
            back = [one for one in lost if self._programmer.has_listener(one[0], one[1].port)]
            if back:
                self.repairs["listener"] += len(back)
                _log.warning(
                    "kernel state is not as it was written: repaired", what="listener", which=pod.name
                )

    async def _compare(self) -> None:
        """From time to time compare a part of what was written with the kernel; everything has its turn."""
        while True:
            share = PARTS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COMPARE):
                    await self._look_now.wait()
                    share = 1
            self._look_now.clear()
            if not self._state.mesh.known:
                continue
            try:
                async with self._passing:
                    await self._look(share)
                await self._hand_listeners()
            except OSError as error:
                _log.error("kernel cannot be compared with what was written", reason=str(error))
            except Exception:
                # A load that failed, for one: the next comparison tries again.
                _log.exception("comparing with the kernel failed")

    async def _link(self) -> None:
        """Pods that came in as they were starting get links when they have had time to start."""
        while True:
            await self._to_link.wait()
            self._to_link.clear()
            while unlinked := self._programmer.unlinked:
                cookie, since = min(unlinked.items(), key=lambda item: item[1])
                if (early := since + STARTED - self._now()) > 0:
                    await asyncio.sleep(early)
                    continue
                # One at a time: who waits for a pass waits for one of them at most.
                async with self._passing:
                    if cookie in self._programmer.unlinked:
                        await self._programmer.link(cookie)

    async def _forget_identities(self) -> None:
        """Forget the numbers of workloads that are long gone, once nothing in the kernel carries them.

        :raises OSError: the kernel cannot be looked at, or the numbers not written.
        """
        mesh, numbers, now = self._state.mesh, self._state.numbers, self._now()
        if not mesh.known:
            return

        def unused() -> set[int]:
            return numbers.unused({label_of(workload) for workload in self._state.mesh.workloads.values()})

        self._unused = {number: self._unused.get(number, now) for number in unused()}
        if not any(now - since >= FORGET for since in self._unused.values()):
            return
        async with self._passing:
            carried = await asyncio.to_thread(self._programmer.carried)
            # Whoever came back meanwhile has its number again.
            gone = {n for n in unused() - carried if now - self._unused.get(n, now) >= FORGET}
            if gone:
                numbers.forget(gone)
                self._state.save_numbers()
                _log.info("numbers of identities that nothing carries were forgotten", count=len(gone))

    async def _maintain(self) -> None:
        """From time to time look for what ended without a word: a runtime that was killed sends no DEL."""
        while True:
            await asyncio.sleep(MAINTENANCE)
            try:
                if self._orphans and (gone := self._orphans - self._programmer.living()):
                    self._orphans -= gone
                    self._dirty.set()
                # Accounts may be many, and need nothing of what is programmed.
                current = set(self.tables.identities.values())
                await asyncio.to_thread(self._programmer.forget_accounts, current)
                await asyncio.to_thread(self._programmer.count_shares)
                await self._forget_identities()
            except OSError as error:
                _log.error("kernel cannot be looked at", reason=str(error))


def _kinds(tables: Tables) -> tuple[api.ListenerKind, ...]:
    """The listeners that pods' connections need."""
    kinds = (api.ListenerKind.OUTBOUND, api.ListenerKind.HBONE)
    return (*kinds, api.ListenerKind.OUTBOUND_L7) if tables.frontends.l7 else kinds


async def _nothing() -> None:
    """Where nobody loads programs."""
