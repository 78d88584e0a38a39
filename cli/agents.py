"""The agents of the nodes, and the way to each: directly, by a controller that knows them, or through the API server.

Owns which way is taken and the errors that name what was tried. On a node of no cluster it is the agent of this machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from cli.cluster import Cluster, NoCluster
from cli.http import Direct, Reader, Refused, Unreachable
from deploy import parts

#: The agent of this machine.
HERE = f"127.0.0.1:{parts.AGENT_ADMIN}"
_AT_ONCE = 16


class BadQuestion(Exception):
    """An agent understands the question and cannot answer it: its own text says why."""


@dataclass(frozen=True, slots=True)
class Agent:
    """``admin`` is HOST:PORT; ``node`` is empty until it was asked."""

    admin: str
    node: str = ""

    def __str__(self) -> str:
        return f"the agent of node {self.node}" if self.node else "the agent"


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the command line says of where to ask."""

    agents: tuple[str, ...] = ()
    controller: str | None = None
    namespace: str = ""
    kubeconfig: Path | None = None
    context: str | None = None


class Agents:
    """Those that can be asked."""

    def __init__(self, reader: Reader, agents: Sequence[Agent], *, where: str) -> None:
        """``where`` says in words where they were looked for."""
        self._reader = reader
        self._agents = list(agents)
        self._where = where
        self._named = False

    @classmethod
    @contextlib.contextmanager
    def reach(cls, chosen: Chosen) -> Iterator[Agents]:
        """:raises Unreachable: there is none, or nobody who knows them answers."""
        if chosen.agents:
            yield cls(Direct(), [Agent(admin) for admin in chosen.agents], where=", ".join(chosen.agents))
            return
        if chosen.controller is not None:
            from cli import watch

            clients = watch.fleet([chosen.controller], Direct()).clients
            found = [Agent(c.admin, c.node) for c in clients if c.component == "agent" and c.admin]
            yield cls(Direct(), found, where=f"the controller at {chosen.controller}")
            return
        with contextlib.ExitStack() as stack:
            try:
                cluster = stack.enter_context(
                    Cluster(chosen.namespace, kubeconfig=chosen.kubeconfig, context=chosen.context)
                )
            except NoCluster as error:
                if chosen.kubeconfig is not None or chosen.context is not None:
                    raise
                yield cls._here(error)
                return
            found = [
                Agent(cluster.admin_of(pod, parts.AGENT_ADMIN), pod["spec"].get("nodeName", ""))
                for pod in cluster.pods(parts.AGENT)
            ]
            yield cls(cluster, found, where=f"namespace {chosen.namespace} of {cluster.server}")

    @classmethod
    def _here(cls, no_cluster: NoCluster) -> Agents:
        """The agent of this machine, where there is no cluster."""
        found = cls(Direct(), [Agent(HERE)], where=HERE)
        try:
            found._name()
        except Unreachable as error:
            raise Unreachable(f"{error}; and there is no cluster: {no_cluster}") from error
        return found

    def all(self) -> list[Agent]:
        """:raises Unreachable: there is none at all, or of those that do not say their node one does not answer."""
        if not self._agents:
            raise Unreachable(f"no agent is known to {self._where}")
        self._name()
        return sorted(self._agents, key=lambda agent: agent.node)

    def of(self, node: str) -> Agent:
        """:raises Unreachable: that node has none."""
        agents = self.all()
        for agent in agents:
            if agent.node == node:
                return agent
        names = ", ".join(agent.node for agent in agents)
        raise Unreachable(
            f"node {node}: no agent of it is known to {self._where}; there are those of {names}"
        )

    def chosen(self, node: str | None) -> list[Agent]:
        """One node's, or all."""
        return self.all() if node is None else [self.of(node)]

    def ask(self, agent: Agent, path: str, parameters: Mapping[str, str] | None = None) -> Any:
        """A page of an agent.

        :raises BadQuestion: it cannot answer that.
        :raises Unreachable: it does not answer.
        """
        given = {name: value for name, value in (parameters or {}).items() if value}
        target = path + (f"?{urlencode(given)}" if given else "")
        try:
            return self._reader.read_json(agent.admin, target, who=str(agent))
        except Refused as error:
            if error.status == 400:
                raise BadQuestion(error.said) from error
            if error.status == 404:
                raise Unreachable(
                    f"{agent} at {agent.admin} has no page {path}: it is of another version"
                ) from error
            raise

    def ask_all(
        self, agents: Sequence[Agent], path: str, parameters: Mapping[str, str] | None = None
    ) -> tuple[list[tuple[Agent, Any]], list[str]]:
        """The same of several at once, and why some did not answer.

        :raises BadQuestion: none answers, and one cannot answer that.
        :raises Unreachable: none answers.
        """

        def one(agent: Agent) -> Any:
            try:
                return self.ask(agent, path, parameters)
            except (Unreachable, BadQuestion) as error:
                return error

        with ThreadPoolExecutor(_AT_ONCE) as threads:
            answers = list(zip(agents, threads.map(one, agents), strict=True))
        failed = [answer for _, answer in answers if isinstance(answer, Exception)]
        if failed and len(failed) == len(answers):
            raise next((e for e in failed if isinstance(e, BadQuestion)), failed[0])
        found = [(agent, answer) for agent, answer in answers if not isinstance(answer, Exception)]
        return found, [str(error) for error in failed if isinstance(error, Unreachable)]

    def _name(self) -> None:
        if self._named:
            return
        self._agents = [
            agent if agent.node else Agent(agent.admin, str(self.ask(agent, "/debug/status")["node"]))
            for agent in self._agents
        ]
        self._named = True
