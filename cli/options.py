"""Options that several commands have, and what they do when nobody answers."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cli import output

#: Exit status: the command was used wrongly, or could not find out.
UNKNOWN = 2

DEFAULT_NAMESPACE = "mycel-system"


class Format(enum.StrEnum):
    """How an answer is written."""

    TABLE = "table"
    JSON = "json"


ControllerOption = Annotated[
    str | None,
    typer.Option(
        "--controller",
        envvar="MYCEL_CONTROLLER",
        help="A controller's admin address, HOST:PORT, instead of a cluster.",
    ),
]
KubeconfigOption = Annotated[
    Path | None, typer.Option("--kubeconfig", help="Instead of $KUBECONFIG or ~/.kube/config.")
]
ContextOption = Annotated[str | None, typer.Option("--context", help="Of the kubeconfig.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON.")]
NamespaceOption = Annotated[
    str,
    typer.Option(
        "--namespace", "-n", envvar="MYCEL_NAMESPACE", help="Where Mycel is, or will be, installed."
    ),
]
AgentOption = Annotated[
    list[str] | None,
    typer.Option(
        "--agent",
        envvar="MYCEL_AGENT",
        help="An agent's admin address, HOST:PORT, instead of a cluster; may be repeated. On a node without a cluster it is "
        "127.0.0.1:15020.",
    ),
]
NodeOption = Annotated[str | None, typer.Option("--node", help="This node only.")]
PinsOption = Annotated[
    Path | None,
    typer.Option(
        "--pins",
        help="Read the kernel maps that are pinned here, as root on the node, without any agent: /sys/fs/bpf/mycel.",
    ),
]
FormatOption = Annotated[Format, typer.Option("--output", "-o", help="table or json.")]


def cannot_reach(error: Exception, hint: str = "") -> NoReturn:
    """End: nobody answers."""
    from common.kubernetes import ApiError

    if isinstance(error, ApiError):
        hint = (
            "Reading the mesh's namespace and `get pods/proxy` in it is what this needs: docs/kubernetes.md"
        )
        output.fail(f"the API server says {error}", hint if error.status in (401, 403) else "")
        raise typer.Exit(UNKNOWN) from error
    output.fail(
        str(error),
        hint
        or "Name a cluster by --kubeconfig and --context or KUBECONFIG, or a controller's admin address by --controller "
        "HOST:PORT or MYCEL_CONTROLLER; for manifests alone use: mycel check --config FOLDER",
    )
    raise typer.Exit(UNKNOWN) from error
