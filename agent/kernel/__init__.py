"""The kernel's half as the agent sees it: typed tables, pods' namespaces, accounts.

Owns everything between the agent's decisions and the pinned maps, programs and links; decides nothing itself.
``model`` has the types, ``facade`` the class that the agent uses, the rest one topic each.
"""

from agent.kernel.errors import KernelError, NoVethError
from agent.kernel.facade import Kernel, MapFullError
from agent.kernel.model import (
    Backend,
    Connection,
    Direction,
    Event,
    FlowCounters,
    FlowKey,
    Frontend,
    Network,
    Peer,
    Pod,
    Pressure,
    Protocol,
    Reason,
    Service,
    Via,
)

__all__ = [
    "Backend",
    "Connection",
    "Direction",
    "Event",
    "FlowCounters",
    "FlowKey",
    "Frontend",
    "Kernel",
    "KernelError",
    "MapFullError",
    "Network",
    "NoVethError",
    "Peer",
    "Pod",
    "Pressure",
    "Protocol",
    "Reason",
    "Service",
    "Via",
]
