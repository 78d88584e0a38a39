"""``mycel upgrade``: the objects of this version onto a cluster that has an earlier one, part by part.

Controllers first: a new controller serves agents and proxies of the version before, not the other way round. Then agents, then
proxies. To an earlier version in the opposite order. Each part is waited for before the next begins, so that a version that does
not come up stops there.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cli import install, installation
from cli.cluster import Cluster, Json
from common.kubernetes import path_of
from deploy import manifests, parts
from deploy.values import Values, ValuesError, load

#: What is rolled out, in order; the controllers take everything that is no workload with them.
STEPS = ((parts.CONTROLPLANE,), (parts.AGENT,), (parts.NODEPROXY, parts.L7PROXY))

_INTERVAL = 0.5


class UpgradeError(Exception):
    """It cannot be done, or did not come up. The text is for people."""


def plan(cluster: Cluster, files: Iterable[Path], settings: Iterable[str]) -> tuple[str, str, Values]:
    """What is to be done: who has applied the objects so far, the version that is there, and the values to use.

    :raises UpgradeError: there is nothing to upgrade, Helm owns it, or the versions are too far apart.
    :raises ValuesError: values cannot be taken.
    """
    deployment = cluster.find(path_of("apps/v1", "deployments", cluster.namespace, parts.CONTROLPLANE))
    if deployment is None:
        raise UpgradeError(
            f"Mycel is not installed in namespace {cluster.namespace}: mycel install | kubectl apply --server-side -f -"
        )
    owner = manager(deployment)
    if owner == "helm":
        raise UpgradeError("Helm installed it: helm upgrade, with the chart of this version")
    namespace = cluster.get(path_of("v1", "namespaces", name=cluster.namespace))
    text = (namespace["metadata"].get("annotations") or {}).get(manifests.VALUES_ANNOTATION, "{}")
    try:
        earlier = json.loads(text)
        if not isinstance(earlier, dict):
            raise ValueError("no mapping")
    except ValueError as error:
        raise ValuesError(
            f"namespace {cluster.namespace}: annotation {manifests.VALUES_ANNOTATION}: {error}"
        ) from error
    values = load(files, settings, earlier)
    image = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
    before = image.rpartition(":")[2]
    check_skew(before, values.image.tag)
    return owner, before, values


def manager(deployment: Json) -> str:
    """Who applies the objects. Going on under that name, fields that this version no longer has are taken away."""
    for entry in deployment["metadata"].get("managedFields") or ():
        if entry.get("operation") == "Apply" and "f:spec" in (entry.get("fieldsV1") or {}):
            return str(entry["manager"])
    return "kubectl"


def check_skew(before: str, after: str) -> None:
    """:raises UpgradeError: the versions are more than one minor version apart: parts of both would not understand each other."""
    old, new = _version(before), _version(after)
    if old is None or new is None:
        return  # a tag that is no version (a build's name): whoever chose it knows
    if old[0] != new[0] or abs(new[1] - old[1]) > 1:
        raise UpgradeError(
            f"from {before} to {after} is more than one minor version: go by each version between, in order"
        )


def order(before: str, after: str) -> tuple[tuple[str, ...], ...]:
    """The steps; to an earlier version the other way round, so that who serves is never older than who is served."""
    old, new = _version(before), _version(after)
    return STEPS[::-1] if old is not None and new is not None and new < old else STEPS


def _version(text: str) -> tuple[int, int] | None:
    found = re.match(r"v?(\d+)\.(\d+)(\D|$)", text)
    return (int(found[1]), int(found[2])) if found else None


def run(
    cluster: Cluster,
    values: Values,
    owner: str,
    steps: tuple[tuple[str, ...], ...],
    *,
    timeout: float,
    say: Callable[[str], Any],
) -> None:
    """Apply and wait, part by part.

    What was chosen is remembered at the end: an upgrade that stops, and goes back, goes back to what was chosen before.

    :param timeout: seconds without any progress.
    :raises UpgradeError: a part does not come up; what comes after it was not touched.
    """
    namespace, *objects = install.objects(values, cluster.namespace)
    workloads = {name for step in steps for name in step}
    there = cluster.get(manifests.path(namespace))["metadata"].get("annotations") or {}
    remembered = {k: v for k, v in there.items() if k == manifests.VALUES_ANNOTATION}
    before = {**namespace, "metadata": namespace["metadata"] | {"annotations": remembered}}
    cluster.apply(manifests.path(namespace), before, manager=owner, force=True)
    for step in steps:
        for one in objects:
            kind, name = one["kind"], one["metadata"]["name"]
            is_workload = kind in ("Deployment", "DaemonSet") and name in workloads
            if (is_workload and name in step) or (not is_workload and parts.CONTROLPLANE in step):
                cluster.apply(manifests.path(one), one, manager=owner, force=True)
        say(f"{', '.join(step)}: applied")
        # A proxy that drains counts as not replaced for as long as it may.
        draining = max(values.nodeproxy.grace_seconds, values.l7proxy.grace_seconds)
        wait(cluster, step, timeout + (draining if parts.NODEPROXY in step else 0))
        say(f"{', '.join(step)}: every pod is of this version and ready")
    cluster.apply(manifests.path(namespace), namespace, manager=owner, force=True)


def wait(cluster: Cluster, names: tuple[str, ...], timeout: float) -> None:
    """Until all pods are of the present version and ready: on many nodes, one after another, that takes as long as it takes.

    :raises UpgradeError: they are not, and nothing has moved on for ``timeout`` seconds.
    """
    most, deadline = -1, 0.0
    while found := installation.rollout(cluster, names):
        if (so_far := installation.progress(cluster, names)) > most:
            most, deadline = so_far, time.monotonic() + timeout
        if time.monotonic() > deadline:
            reasons = "; ".join(f"{finding.object} {finding.message}" for finding in found)
            raise UpgradeError(f"not ready, and nothing has moved on for {timeout:.0f} s: {reasons}")
        time.sleep(_INTERVAL)
