"""The ``mycel`` command: arguments, exit statuses, and which module does the work.

Exit statuses: 0 all well; 1 something is wrong with what was asked about; 2 the command was used wrongly, or could not find
out (nobody answers). Modules are imported by the command that needs them, so that ``mycel version`` starts at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cli import node_commands, output
from cli.options import (
    DEFAULT_NAMESPACE,
    UNKNOWN,
    ContextOption,
    ControllerOption,
    JsonOption,
    KubeconfigOption,
    NamespaceOption,
    cannot_reach,
)

app = typer.Typer(
    name="mycel",
    help="A kernel-native service mesh: Python decides, the kernel carries.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
)
ValuesOption = Annotated[
    list[Path] | None,
    typer.Option("--values", "-f", help="YAML file of values, as for the Helm chart; may be repeated."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="One value, as in image.tag=1.0; may be repeated, and wins over files."),
]


@app.command()
def version(as_json: JsonOption = False) -> None:
    """The version of this command and of the contracts that it speaks."""
    from importlib import metadata

    from controlplane.api import API_VERSION

    found = {"version": metadata.version("mycel"), "controller_api": API_VERSION}
    if as_json:
        output.write_json(found)
    else:
        print(f"mycel {found['version']} (controller API {found['controller_api']})")


@app.command()
def check(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="Check the manifests of this folder, without any running mesh.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    pre: Annotated[
        bool, typer.Option("--pre", help="Check whether Mycel can be installed on the cluster.")
    ] = False,
    wait: Annotated[
        str, typer.Option("--wait", help="Go on until there is no error, at most so long: 30s, 2m.")
    ] = "0s",
    controller: ControllerOption = None,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
    as_json: JsonOption = False,
) -> None:
    """What is wrong, and what to do about it: in a folder of manifests, in a cluster, or in the running mesh."""
    from cli import check as checks
    from cli.cluster import Cluster, NoCluster
    from cli.http import Unreachable
    from common.kubernetes import ApiError
    from controlplane.model.findings import Severity

    seconds = _duration(wait, "--wait")
    try:
        if config is not None:
            found = checks.offline(config)
        elif controller is not None:
            found = checks.until_well(lambda: checks.online([controller]), seconds)
        else:
            with Cluster(namespace, kubeconfig=kubeconfig, context=context) as cluster:
                if pre:
                    from cli import preflight

                    found = preflight.findings(cluster)
                else:
                    from cli import installation

                    found = checks.until_well(lambda: installation.findings(cluster), seconds)
    except (Unreachable, NoCluster, ApiError) as error:
        cannot_reach(error)
    checks.write(found, as_json=as_json)
    if any(finding.severity is Severity.ERROR for finding in found):
        raise typer.Exit(1)


@app.command()
def stat(
    controller: ControllerOption = None,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
    interval: Annotated[float, typer.Option("--interval", help="Seconds to measure.", min=0.1)] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Success, rate, latency and mutual TLS of every service, and where it was measured."""
    from cli import watch
    from cli.cluster import Cluster, NoCluster
    from cli.http import Unreachable
    from common.kubernetes import ApiError

    try:
        if controller is not None:
            measured = watch.measure([controller], interval)
        else:
            from cli import installation

            with Cluster(namespace, kubeconfig=kubeconfig, context=context) as cluster:
                measured = watch.measure(installation.controllers(cluster), interval, cluster)
    except (Unreachable, NoCluster, ApiError) as error:
        cannot_reach(error)
    watch.write(measured, as_json=as_json)


@app.command()
def install(
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    values: ValuesOption = None,
    settings: SetOption = None,
    crds: Annotated[
        str,
        typer.Option(
            "--crds",
            help="Definitions to bring that the cluster lacks, of: istio,gateway-api,linkerd,smi. Asks the cluster.",
        ),
    ] = "",
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Write the objects of an installation as YAML, for kubectl apply --server-side -f - (and again to upgrade)."""
    from cli import install as installation
    from cli.cluster import Cluster, NoCluster
    from cli.http import Unreachable
    from common.kubernetes import ApiError
    from deploy import manifests
    from deploy.values import ValuesError, check_namespace, load

    try:
        chosen = load(values or (), settings or ())
        definitions = []
        if projects := [project.strip() for project in crds.split(",") if project.strip()]:
            with Cluster(namespace, kubeconfig=kubeconfig, context=context) as cluster:
                definitions = cluster.missing_definitions(projects)
        found = installation.objects(chosen, check_namespace(namespace), definitions)
    except (ValueError, ValuesError, NoCluster, Unreachable, ApiError) as error:
        output.fail(str(error))
        raise typer.Exit(UNKNOWN) from error
    sys.stdout.write(manifests.to_yaml(found))


@app.command()
def upgrade(
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    values: ValuesOption = None,
    settings: SetOption = None,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
    timeout: Annotated[
        str, typer.Option("--timeout", help="Without any progress, until it is given up.")
    ] = "5m",
) -> None:
    """Bring a cluster's installation to this version: controllers, then agents, then proxies (back: the other way round).

    Values are those of the installation, and what is given here over them.
    """
    from cli import upgrade as upgrading
    from cli.cluster import Cluster, NoCluster
    from cli.http import Unreachable
    from common.kubernetes import ApiError
    from deploy.values import ValuesError

    seconds = _duration(timeout, "--timeout")
    try:
        with Cluster(namespace, kubeconfig=kubeconfig, context=context) as cluster:
            owner, before, chosen = upgrading.plan(cluster, values or (), settings or ())
            print(f"from {before} to {chosen.image.tag}")
            steps = upgrading.order(before, chosen.image.tag)
            upgrading.run(cluster, chosen, owner, steps, timeout=seconds, say=print)
    except (ValuesError, NoCluster) as error:
        output.fail(str(error))
        raise typer.Exit(UNKNOWN) from error
    except (upgrading.UpgradeError, Unreachable, ApiError) as error:
        output.fail(str(error))
        raise typer.Exit(1) from error


@app.command()
def uninstall(
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    timeout: Annotated[str, typer.Option("--timeout", help="For every agent to leave its node.")] = "2m",
) -> None:
    """Take everything of Mycel off a cluster and its nodes; what you made stays, and so do other projects' definitions."""
    from cli import uninstall as removing
    from cli.cluster import Cluster, NoCluster
    from cli.http import Unreachable
    from common.kubernetes import ApiError

    seconds = _duration(timeout, "--timeout")
    try:
        with Cluster(namespace, kubeconfig=kubeconfig, context=context) as cluster:
            if not yes:
                typer.confirm(
                    f"Remove Mycel from {cluster.server}? Enrolled pods go on in plain text.", abort=True
                )
            for text in removing.run(cluster, timeout=seconds, say=print):
                print(f"  {text}")
    except NoCluster as error:
        output.fail(str(error))
        raise typer.Exit(UNKNOWN) from error
    except (removing.UninstallError, Unreachable, ApiError) as error:
        output.fail(str(error))
        raise typer.Exit(1) from error


@app.command("envoy-bootstrap")
def envoy_bootstrap(
    node: Annotated[str, typer.Option("--node", help="The node's name, as its agent has it.")],
    controller: Annotated[str, typer.Option("--controller", help="The controller's xDS address, HOST:PORT.")],
    roots: Annotated[
        Path, typer.Option("--roots", help="PEM bundle that the controller's certificate chains to.")
    ],
    credential: Annotated[
        Path, typer.Option("--credential", help="The node's credential.", exists=True, dir_okay=False)
    ],
    write_to: Annotated[
        Path, typer.Option("--output", help="Written readable by its owner only: it holds the credential.")
    ],
    socket: Annotated[
        str, typer.Option("--envoy", help="As the node proxy's --envoy.")
    ] = "/run/mycel/nodeproxy/envoy.sock",
    admin: Annotated[
        str, typer.Option("--admin", help="Envoy's admin server, ADDRESS:PORT.")
    ] = "127.0.0.1:15000",
) -> None:
    """Write the bootstrap of an Envoy that takes l7proxy's place on a node."""
    from cli import envoy

    try:
        made = envoy.bootstrap(
            node=node,
            controller=envoy.split_address(controller),
            roots=str(roots.absolute()),
            credential=credential.read_text(),
            socket=socket,
            admin=envoy.split_address(admin),
        )
    except (ValueError, OSError) as error:
        output.fail(str(error))
        raise typer.Exit(UNKNOWN) from error
    envoy.write(made, write_to)
    print(f"written to {write_to}; run it in the cgroup that the agent has as --envoy-cgroup:")
    print(f"  envoy --config-path {write_to} --concurrency 1")


@app.command()
def demo() -> None:
    """Two nodes on this machine: a canary, mutual TLS, a policy that bites. Needs root."""
    from lab import demo as lab_demo

    raise typer.Exit(lab_demo.main())


def _duration(text: str, option: str) -> float:
    """Seconds of ``30s``, ``2m`` or ``30``."""
    number, factor = text.strip(), 1.0
    for unit, seconds in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0)):
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), seconds
            break
    try:
        found = float(number) * factor
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e6:
        raise typer.BadParameter(f"{text!r} is no duration, as in 30s or 2m", param_hint=option)
    return found


node_commands.add_to(app)


if __name__ == "__main__":
    app()
