"""The node's one owner of state: the mesh as the controller tells it and the pods as the runtime attaches them.

Puts together the state with its files, the reconciler that brings it into force and what CNI requests do to it; owns what others
ask of them (the proxies, the search for running pods, pages and metrics).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from agent import api
from agent.attaching import Attaching
from agent.compiler import Tables
from agent.identities import Identities
from agent.live import Candidate, is_found_running
from agent.mesh import Mesh, one_of_each_family
from agent.namespaces import Namespaces
from agent.passage import Stage
from agent.pods import Attachment, AttachmentKey, Pods
from agent.programmer import Programmer
from agent.reconciler import Carriers, Reconciler
from agent.state import State
from agent.storage import Storage
from agent.sweeper import Sweeper
from common import logs
from common.tasks import Tasks
from controlplane.api import ResourceError, Update

_log = logs.get(__name__)


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
        self.state = State(storage, boot=boot)
        self.on_change: Callable[[], None] = lambda: None
        self._programmer = programmer
        self._namespaces = namespaces
        self._reconciler = Reconciler(
            name, self.state, programmer=programmer, namespaces=namespaces, sweeper=sweeper
        )
        #: What CNI requests act on.
        self.cni = Attaching(
            name, self.state, reconciler=self._reconciler, programmer=programmer, namespaces=namespaces
        )
        self._tasks = Tasks()

    @property
    def mesh(self) -> Mesh:
        return self.state.mesh

    @property
    def numbers(self) -> Identities:
        return self.state.numbers

    @property
    def pods(self) -> Pods:
        return self.state.pods

    @property
    def tables(self) -> Tables:
        """What the last pass compiled."""
        return self._reconciler.tables

    def tell(self, proxies: Carriers) -> None:
        """From now on they hear of pods."""
        self._reconciler.proxies = proxies

    def loads(self, load: Callable[[], Awaitable[None]]) -> None:
        """How programs that somebody detached come back."""
        self._reconciler.load = load

    def gives_roles(self, give: Callable[[], int]) -> None:
        """How roles that the kernel has lost come back; ``give`` says how many those were."""
        self._reconciler.give_roles = give

    def look(self) -> None:
        """Compare the kernel with what was written into it now, all of it."""
        self._reconciler.look()

    @property
    def repairs(self) -> Mapping[str, int]:
        """What the kernel had lost or changed and was written again, by what it is."""
        return dict(self._reconciler.repairs)

    # Life

    async def start(self) -> None:
        """Load the last good state, adopt the pods that still live, bring the kernel to agree, and go on reconciling."""
        self.cni.started()
        self.state.load(programmed=bool(self._programmer.programmed))
        self._tasks.start(self.state.keep(), name="save mesh")
        await self._reconciler.start()

    async def stop(self) -> None:
        """Leave the kernel and the proxies as they are: an agent that ends is one that is replaced."""
        await self._reconciler.stop()
        await self._tasks.cancel()
        self.state.close()

    @property
    def problem(self) -> str:
        """Why the node is not as it should be; empty when it is."""
        if not self.state.mesh.known:
            return "the controller has not said anything yet"
        if not self._reconciler.last.clean:
            return self._reconciler.last.text()
        return ""

    # Controller

    async def informed(self) -> None:
        """Wait until the controller has said something, to this agent or a predecessor."""
        await self.cni.informed()

    async def apply(self, update: Update) -> tuple[ResourceError, ...]:
        """Bring an update into force; gives what of it is not."""
        before = self.state.mesh
        errors = self.state.apply(update)
        self._reconciler.note_passages(before, update)
        self.cni.told()
        outcome = await self._reconciler.settled()
        self.on_change()
        return errors + outcome.resources

    def unattached(self) -> list[str]:
        """Ready pods of this node in the mesh that were never attached through the plugin (they ran before it)."""
        attached = {attachment.pod_uid for attachment in self.state.pods}
        return sorted(
            f"{workload.namespace}/{workload.name}"
            for workload in self.state.mesh.workloads.values()
            if workload.node == self.name
            and workload.enrolled
            and workload.ready
            and workload.uid not in attached
        )

    # Running pods (agent.live.Book)

    def candidates(self) -> Sequence[Candidate]:
        attached = {attachment.pod_uid for attachment in self.state.pods}
        return [
            Candidate(workload.uid, workload.namespace, workload.name, addresses)
            for workload in self.state.mesh.workloads.values()
            if workload.enrolled and workload.node == self.name and workload.uid not in attached
            # Without an address its sandbox is still being made, and will come by ADD.
            if (addresses := one_of_each_family(workload.addresses))
        ]

    def found_running(self) -> Sequence[Attachment]:
        return [attachment for attachment in self.state.pods if is_found_running(attachment)]

    def lives(self, attachment: Attachment) -> bool:
        workload = self.state.mesh.workloads.get(attachment.pod_uid)
        return (
            self.state.pods.get(attachment.key) is not None
            and workload is not None
            and workload.node == self.name
            and attachment.addresses[0] in workload.addresses
        )

    async def attach_running(self, attachment: Attachment, netns: int) -> None:
        """Take a pod that runs already into the book; it joins stage by stage, see :mod:`agent.passage`.

        :raises OSError: the book cannot be written, and the pod is not in it.
        """
        self.state.book(attachment)
        self._namespaces.hold(attachment.netns_cookie, netns)
        await self._reconciler.settled()
        _log.info(
            "running pod joins",
            pod=f"{attachment.pod_namespace}/{attachment.pod_name}",
            uid=attachment.pod_uid,
            addresses=",".join(attachment.addresses),
        )

    async def delete(self, key: AttachmentKey) -> None:
        """As :meth:`agent.attaching.Attaching.delete`: no runtime says it of a pod that was found running."""
        await self.cni.delete(key)

    def stage(self, netns_cookie: int) -> Stage | None:
        """Where a pod is on its way into the mesh or out of it."""
        return self._reconciler.passages.stage(netns_cookie)

    # Proxies (agent.proxies.Enrolled)

    def enrolled(self) -> Sequence[api.Enroll]:
        """The pods that proxies carry, without listeners."""
        return tuple(self._reconciler.told.values())

    def ended(self) -> Sequence[tuple[str, int]]:
        """(UID, netns cookie) of pods that ended while no agent ran."""
        return tuple(self._reconciler.ended)

    def attached(self, uid: str, netns_cookie: int) -> bool:
        return any(a.pod_uid == uid and a.netns_cookie == netns_cookie for a in self.state.pods)
