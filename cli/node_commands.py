"""``mycel agent``, ``mycel bpf`` and ``mycel why``: what the nodes have, and why a connection gets its verdict.

Owns these commands' arguments and exit statuses. Modules that do the work are imported by the command that needs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import output
from cli.options import (
    DEFAULT_NAMESPACE,
    UNKNOWN,
    AgentOption,
    ContextOption,
    ControllerOption,
    Format,
    FormatOption,
    KubeconfigOption,
    NamespaceOption,
    NodeOption,
    PinsOption,
    cannot_reach,
)

agent = typer.Typer(name="agent", help="The agents of the nodes.", no_args_is_help=True)
bpf = typer.Typer(name="bpf", help="What the kernel of each node has.", no_args_is_help=True)

_HINT = (
    "Name a cluster by --kubeconfig and --context or KUBECONFIG, a controller by --controller HOST:PORT or MYCEL_CONTROLLER, "
    "or agents by --agent HOST:PORT; on a node without an agent: --pins /sys/fs/bpf/mycel"
)


def add_to(app: typer.Typer) -> None:
    app.command()(why)
    app.add_typer(agent)
    app.add_typer(bpf)


@agent.command("status")
def status(
    agents: AgentOption = None,
    controller: ControllerOption = None,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
    node: NodeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Each node's agent: its configuration, pods, proxies, splice, and whatever is wrong. Exit status 1: something is."""
    from cli import agent_status

    answers, failed = _pages("/debug/status", {}, node, agents, controller, namespace, kubeconfig, context)
    wrong = {name: agent_status.problems(found) for name, found in answers}
    if form is Format.JSON:
        output.write_json([{**found, "problems": wrong[name]} for name, found in answers])
    else:
        agent_status.write(answers)
    _end(failed, wrong=any(wrong.values()))


@bpf.command("maps")
def maps(
    name: Annotated[
        str | None, typer.Argument(metavar="[MAP]", help="List this map's elements.", show_default=False)
    ] = None,
    last: Annotated[int, typer.Option("--last", help="Elements at most, of each node.", min=1)] = 1000,
    pins: PinsOption = None,
    agents: AgentOption = None,
    controller: ControllerOption = None,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
    node: NodeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """The kernel maps: type, how many elements, how many there may be, what was refused for lack of room; or a map's elements."""
    from cli import bpf as writing

    if pins is not None:
        _alone("--pins", agents, node)
        with _reading_pins():
            found = writing.pinned_maps(pins) if name is None else writing.pinned_elements(pins, name, last)
        answers, failed = _here(found)
    else:
        query = {} if name is None else {"name": name, "newest": str(last)}
        answers, failed = _pages(
            "/debug/maps", query, node, agents, controller, namespace, kubeconfig, context
        )
    _write(answers, form, writing.write_maps if name is None else writing.write_elements)
    _end(failed)


@bpf.command("flows")
def flows(
    last: Annotated[int, typer.Option("--last", help="The newest so many of each node.", min=1)] = 100,
    sums: Annotated[
        bool, typer.Option("--sums", help="Sums since the maps were made, in place of single connections.")
    ] = False,
    verdict: Annotated[str, typer.Option("--verdict", help="allowed or refused.")] = "",
    reason: Annotated[str, typer.Option("--reason", help="Of a refusal: policy, network-policy, ...")] = "",
    source: Annotated[str, typer.Option("--from", help="NAMESPACE/WORKLOAD or NAMESPACE.")] = "",
    destination: Annotated[str, typer.Option("--to", help="NAMESPACE/WORKLOAD or NAMESPACE.")] = "",
    pod: Annotated[str, typer.Option("--pod", help="NAMESPACE/NAME whose end it is.")] = "",
    address: Annotated[str, typer.Option("--address", help="At either end.")] = "",
    port: Annotated[str, typer.Option("--port", help="The server's.")] = "",
    protocol: Annotated[str, typer.Option("--protocol", help="tcp or udp.")] = "",
    direction: Annotated[str, typer.Option("--direction", help="inbound or outbound.")] = "",
    pins: PinsOption = None,
    agents: AgentOption = None,
    controller: ControllerOption = None,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
    node: NodeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Connections and conversations that ended or were refused, newest first; or the sums (all that --pins can tell)."""
    from cli import bpf as writing

    filters = {
        "verdict": verdict,
        "reason": reason,
        "source": source,
        "destination": destination,
        "pod": pod,
        "address": address,
        "port": port,
        "protocol": protocol,
        "direction": direction,
    }
    given = {name: value for name, value in filters.items() if value}
    if (sums or pins is not None) and given:
        option = next(iter(given))
        raise typer.BadParameter(
            f"sums are shown whole: --{ {'source': 'from', 'destination': 'to'}.get(option, option) } is for records"
        )
    if pins is not None:
        _alone("--pins", agents, node)
        with _reading_pins():
            answers, failed = _here(writing.pinned_sums(pins))
    else:
        query = {} if sums else {"newest": str(last), **given}
        answers, failed = _pages(
            "/debug/flows", query, node, agents, controller, namespace, kubeconfig, context
        )
    _write(answers, form, writing.write_sums if sums or pins is not None else writing.write_flows)
    _end(failed)


@bpf.command("policies")
def policies(
    pod: Annotated[
        str | None,
        typer.Argument(metavar="[POD]", help="NAMESPACE/NAME, UID or address.", show_default=False),
    ] = None,
    pins: PinsOption = None,
    agents: AgentOption = None,
    controller: ControllerOption = None,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
    node: NodeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """The verdicts that each pod's kernel has: who may connect where, by identity, port and address, and NetworkPolicy."""
    from cli import bpf as writing

    if pins is not None:
        _alone("--pins", agents, node)
        with _reading_pins():
            answers, failed = _here(writing.pinned_policies(pins, pod))
    else:
        query = {"pod": pod} if pod else {}
        answers, failed = _pages(
            "/debug/policies", query, node, agents, controller, namespace, kubeconfig, context
        )
    _write(answers, form, writing.write_policies)
    _end(failed)


def why(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Pod (NAMESPACE/NAME, NAME.NAMESPACE, UID) or address; kubelet or host: a process of --from-node.",
        ),
    ],
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DST:PORT", help="Service (NAME.NAMESPACE, host name), pod or address; port or its name."
        ),
    ],
    udp: Annotated[bool, typer.Option("--udp", help="A datagram, not a TCP connection.")] = False,
    from_node: Annotated[
        str | None,
        typer.Option("--from-node", help="The node that it comes from, where SRC does not say it."),
    ] = None,
    pins: PinsOption = None,
    agents: AgentOption = None,
    controller: ControllerOption = None,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Why a connection would be allowed or refused now: each step of the kernel, by its own tables, and the policies that decide.

    Exit status 1: it is refused (by some endpoint), or kernel and policies differ; 2: that is not known.
    """
    from cli import why as asking

    protocol = "udp" if udp else "tcp"
    if pins is not None:
        _alone("--pins", agents, from_node, "--from-node")
        with _reading_pins():
            answer = asking.from_pins(pins, source, destination, protocol=protocol)
    else:
        with _reaching(agents, controller, namespace, kubeconfig, context) as found:
            answer = asking.ask(found, source, destination, protocol=protocol, node=from_node)
    if form is Format.JSON:
        output.write_json(answer)
    else:
        asking.write(answer)
    raise typer.Exit(asking.status(answer))


# What they have in common


@contextlib.contextmanager
def _reaching(
    agents: list[str] | None,
    controller: str | None,
    namespace: str,
    kubeconfig: Path | None,
    context: str | None,
) -> Iterator[Any]:
    """The agents (:class:`cli.agents.Agents`); errors end the command."""
    from cli.agents import Agents, BadQuestion, Chosen
    from cli.cluster import NoCluster
    from cli.http import Unreachable
    from common.kubernetes import ApiError

    try:
        with Agents.reach(Chosen(tuple(agents or ()), controller, namespace, kubeconfig, context)) as found:
            yield found
    except (Unreachable, NoCluster, ApiError) as error:
        cannot_reach(error, _HINT)
    except (BadQuestion, ValueError) as error:
        output.fail(str(error))
        raise typer.Exit(UNKNOWN) from error


def _pages(
    path: str,
    query: Mapping[str, str],
    node: str | None,
    agents: list[str] | None,
    controller: str | None,
    namespace: str,
    kubeconfig: Path | None,
    context: str | None,
) -> tuple[list[tuple[str, Any]], list[str]]:
    """A page of each node, by node, and who did not answer."""
    with _reaching(agents, controller, namespace, kubeconfig, context) as found:
        answers, failed = found.ask_all(found.chosen(node), path, query)
        return [(one.node, answer) for one, answer in answers], failed


@contextlib.contextmanager
def _reading_pins() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError) as error:
        # KernelError is an OSError that names the pin.
        output.fail(str(error))
        raise typer.Exit(UNKNOWN) from error


def _here(found: Any) -> tuple[list[tuple[str, Any]], list[str]]:
    """As :func:`_pages`, of this machine, which has no name."""
    return [("", found)], []


def _alone(option: str, agents: list[str] | None, node: str | None, of_node: str = "--node") -> None:
    """Pins are this machine's: nobody is asked."""
    if node is not None:
        raise typer.BadParameter(f"{option} reads this machine's own maps: it goes without {of_node}")
    if agents:
        raise typer.BadParameter(f"{option} asks no agent: it goes without --agent")


def _write(
    answers: list[tuple[str, Any]],
    form: Format,
    write: Callable[[list[tuple[str, Any]]], None],
) -> None:
    if form is Format.JSON:
        output.write_json([{"node": node, **one} for node, found in answers for one in found])
    else:
        write(answers)


def _end(failed: list[str], *, wrong: bool = False) -> None:
    for text in failed:
        output.fail(text)
    if failed or wrong:
        raise typer.Exit(UNKNOWN if failed else 1)
