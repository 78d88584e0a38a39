"""What somebody who installs Mycel may choose: the values of ``mycel install --values`` and of the Helm chart alike.

Owns names, types, defaults and what is refused. Docstrings after a field become its comment in the chart's
``values.yaml`` and its description in ``values.schema.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from bpf import limits

Name = Annotated[str, msgspec.Meta(min_length=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[int, msgspec.Meta(ge=1, le=3600)]
Patience = Annotated[int, msgspec.Meta(ge=0, le=86400)] | Literal["never"]
MapSize = Annotated[str, msgspec.Meta(pattern="^[a-z_]+=[0-9]+$")]
FolderPath = Annotated[str, msgspec.Meta(pattern="^/")]
Toleration = dict[str, Any]


class ValuesError(Exception):
    """Values that cannot be taken. The text names the value and says why."""


class _Values(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    pass


class Quantities(_Values, frozen=True):
    cpu: Annotated[Name, msgspec.Meta(description="Processors, as Kubernetes writes them.")]
    memory: Annotated[Name, msgspec.Meta(description="Bytes, as Kubernetes writes them.")]


class MemoryLimit(_Values, frozen=True):
    memory: Annotated[Name, msgspec.Meta(description="Bytes, as Kubernetes writes them.")]


class Resources(_Values, frozen=True):
    requests: Annotated[Quantities, msgspec.Meta(description="What the scheduler sets aside.")]
    limits: Annotated[
        MemoryLimit,
        msgspec.Meta(description="No limit of processors: a throttled proxy is a slow mesh."),
    ]


class Image(_Values, frozen=True):
    repository: Annotated[Name, msgspec.Meta(description="What stands before /agent and /mesh.")] = "mycel.io"
    tag: Annotated[Name, msgspec.Meta(description="Version of both images.")] = msgspec.field(
        default_factory=lambda: metadata.version("mycel")
    )
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    pull_secrets: Annotated[
        tuple[dict[str, str], ...],
        msgspec.Meta(description="Secrets of the namespace for the registry: [{name: ...}]."),
    ] = ()


class Log(_Values, frozen=True):
    level: Annotated[
        Name,
        msgspec.Meta(description="error, warning, info or debug; single loggers as in info,agent.cni:debug."),
    ] = "info"
    format: Literal["text", "json"] = "json"


class Controlplane(_Values, frozen=True):
    replicas: Count = 2
    priority_class_name: str = "system-cluster-critical"
    resources: Resources = Resources(Quantities("100m", "192Mi"), MemoryLimit("1Gi"))
    node_selector: dict[str, str] = msgspec.field(default_factory=lambda: {"kubernetes.io/os": "linux"})
    tolerations: tuple[Toleration, ...] = ()


class Agent(_Values, frozen=True):
    priority_class_name: str = "system-node-critical"
    resources: Annotated[
        Resources,
        msgspec.Meta(
            description="Loading the kernel programs needs LLVM for a second: 110 MB, and its file pages."
        ),
    ] = Resources(Quantities("50m", "128Mi"), MemoryLimit("640Mi"))
    flow_log: Annotated[
        str,
        msgspec.Meta(
            description="Flow records as JSON lines: - for standard output, or a file below node.stateDir."
        ),
    ] = ""
    splice: Annotated[
        Literal["enabled", "disabled"],
        msgspec.Meta(description="Connections between two pods of a node go past TCP (docs/splice.md)."),
    ] = "enabled"
    max_unavailable: Annotated[
        Name | int,
        msgspec.Meta(
            description="Nodes whose agent may be away at once in an update. Traffic goes on there."
        ),
    ] = "10%"
    map_sizes: Annotated[
        tuple[MapSize, ...],
        msgspec.Meta(
            description="Elements that kernel maps may hold, as in [pods=2048, captured=524288]; another size is carried over "
            "at the agent's next start."
        ),
    ] = ()


class Proxy(_Values, frozen=True):
    priority_class_name: str = "system-node-critical"
    resources: Resources = Resources(Quantities("50m", "96Mi"), MemoryLimit("1Gi"))
    drain_seconds: Annotated[
        Seconds, msgspec.Meta(description="For connections that are open when it is told to end.")
    ] = 30
    grace_seconds: Annotated[
        Seconds, msgspec.Meta(description="Until it is killed: longer than drainSeconds.")
    ] = 45


class Cni(_Values, frozen=True):
    bin_dir: Annotated[
        FolderPath, msgspec.Meta(description="Where the container runtime looks for CNI plugins.")
    ] = "/opt/cni/bin"
    conf_dir: Annotated[FolderPath, msgspec.Meta(description="Where it looks for CNI configuration.")] = (
        "/etc/cni/net.d"
    )


class Node(_Values, frozen=True):
    """Paths of a node."""

    run_dir: FolderPath = "/run/mycel"
    state_dir: FolderPath = "/var/lib/mycel"
    bpf_dir: Annotated[FolderPath, msgspec.Meta(description="A mounted bpf file system.")] = "/sys/fs/bpf"


class Webhook(_Values, frozen=True):
    failure_policy: Annotated[
        Literal["Ignore", "Fail"],
        msgspec.Meta(
            description="What the API server does while no controller answers. Ignore is safe: the controller judges every "
            "object again, and one that it refuses does not come into force."
        ),
    ] = "Ignore"
    timeout_seconds: Annotated[int, msgspec.Meta(ge=1, le=30)] = 5


class Values(_Values, frozen=True):
    """Everything; the defaults install a mesh of the usual shape."""

    image: Image = Image()
    trust_domain: Annotated[
        Name, msgspec.Meta(description="Of all identities: spiffe://TRUST-DOMAIN/...")
    ] = "cluster.local"
    cluster_domain: Annotated[Name, msgspec.Meta(description="The cluster's DNS domain.")] = "cluster.local"
    revoke_after: Annotated[
        Patience,
        msgspec.Meta(
            description="Seconds that an open connection has once policy refuses it; never: until it ends by itself."
        ),
    ] = 0
    outside: Annotated[
        tuple[Name, ...],
        msgspec.Meta(
            description="Namespaces that stay outside the mesh whatever their labels, beside our own.",
            min_length=1,
        ),
    ] = ("kube-system",)
    log: Log = Log()
    controlplane: Controlplane = Controlplane()
    agent: Agent = Agent()
    nodeproxy: Proxy = Proxy()
    l7proxy: Proxy = Proxy()
    cni: Cni = Cni()
    node: Node = Node()
    webhook: Webhook = Webhook()


_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def check_namespace(name: str) -> str:
    """The name, if a namespace may have it (RFC 1123 label). :raises ValuesError: it may not."""
    if not _NAMESPACE.fullmatch(name):
        raise ValuesError(
            f"{name!r} is no name of a namespace: lower case letters, digits and dashes, at most 63"
        )
    if name in ("kube-system", "kube-public", "kube-node-lease", "default"):
        raise ValuesError(f"namespace {name} has other inhabitants: the mesh needs one of its own")
    return name


def chosen(values: Values) -> str:
    """What differs from the defaults, as JSON; without the images' tag, which is the version and belongs to no choice."""

    def differing(one: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in one.items():
            before = default.get(name)
            if value != before:
                both = isinstance(value, dict) and isinstance(before, dict) and before
                found[name] = differing(value, before) if both else value  # type: ignore[arg-type]
        return found

    made = differing(msgspec.to_builtins(values), msgspec.to_builtins(Values()))
    made.get("image", {}).pop("tag", None)
    return json.dumps({name: value for name, value in made.items() if value != {}}, sort_keys=True)


def load(
    files: Iterable[Path] = (), settings: Iterable[str] = (), earlier: dict[str, Any] | None = None
) -> Values:
    """Values from YAML files, later ones over earlier ones, then ``a.b=value`` settings (value: YAML), over the defaults.

    :param earlier: what was chosen before (:func:`chosen`), over which all this goes.

    :raises ValuesError: a file cannot be read, a name is unknown, a value is of the wrong kind.
    """
    merged: dict[str, Any] = {}
    _merge(merged, earlier or {})
    for file in files:
        try:
            found = yaml.safe_load(file.read_text("utf-8"))
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            raise ValuesError(f"{file}: {error}") from error
        if found is not None and not isinstance(found, dict):
            raise ValuesError(f"{file}: no mapping of values")
        _merge(merged, found or {})
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not all(path.split(".")):
            raise ValuesError(f"{setting!r} is not NAME=VALUE, as in image.tag=1.0")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValuesError(f"{setting!r}: {error}") from error
        if isinstance(value, float):
            value = text  # as in Helm: 1.0 is a version more often than a number
        for part in reversed(path.split(".")):
            value = {part: value}
        _merge(merged, value)
    defaults = msgspec.to_builtins(Values())
    try:
        values = msgspec.convert(_over(defaults, merged), Values)
    except msgspec.ValidationError as error:
        raise ValuesError(f"values: {error}") from error
    try:
        limits.parse_all(values.agent.map_sizes)
    except limits.SizeError as error:
        raise ValuesError(f"values: agent.mapSizes: {error}") from error
    for name, proxy in (("nodeproxy", values.nodeproxy), ("l7proxy", values.l7proxy)):
        if proxy.grace_seconds <= proxy.drain_seconds:
            raise ValuesError(
                f"values: {name}.graceSeconds ({proxy.grace_seconds}) has to be longer than "
                f"{name}.drainSeconds ({proxy.drain_seconds}), or connections are cut"
            )
    return values


def _merge(into: dict[str, Any], what: dict[str, Any]) -> None:
    for name, value in what.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _over(defaults: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Chosen values over defaults; null takes the default, as in Helm."""
    result = dict(defaults)
    for name, value in chosen.items():
        if value is None:
            continue
        before = result.get(name)
        result[name] = _over(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result
