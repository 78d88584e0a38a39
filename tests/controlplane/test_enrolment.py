"""Who is in the mesh: every dialect's way in and out, and what keeps a pod out that asks."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.api import MeshConfig
from controlplane.model.snapshot import Snapshot
from controlplane.model.world import Settings
from tests.controlplane.support import Manifest, compile_all, messages, namespace, pod

MYCEL: dict[str, Any] = {"mycel.io/mesh": "enabled"}
AMBIENT: dict[str, Any] = {"istio.io/dataplane-mode": "ambient"}
INJECTION = {"istio-injection": "enabled"}
LINKERD = {"linkerd.io/inject": "enabled"}
INJECT = "sidecar.istio.io/inject"
INJECTED: dict[str, Any] = {INJECT: "true"}


def enrolled(snapshot: Snapshot) -> bool:
    (workload,) = snapshot.workloads.values()
    return workload.enrolled


@pytest.mark.parametrize(
    ("labels", "own", "expected"),
    [
        ({}, {}, False),
        (MYCEL, {}, True),
        (AMBIENT, {}, True),
        (INJECTION, {}, True),
        ({"istio-injection": "disabled"}, {}, False),
        ({"mycel.io/mesh": "yes"}, {}, False),
        # the pod's own word
        ({}, MYCEL, True),
        ({}, AMBIENT, True),
        ({}, {INJECT: "true"}, True),
        (MYCEL, {"mycel.io/mesh": "disabled"}, False),
        (INJECTION, {"mycel.io/mesh": "disabled"}, False),
        (AMBIENT, {"istio.io/dataplane-mode": "none"}, False),
        (MYCEL, {"istio.io/dataplane-mode": "none"}, False),
        (INJECTION, {INJECT: "false"}, False),
        # opting out of injection is about injection only
        (AMBIENT, {INJECT: "false"}, True),
        ({"istio-injection": "disabled"}, {INJECT: "true"}, False),
        ({"istio-injection": "disabled"}, MYCEL, True),
        # a namespace that is out
        ({"mycel.io/mesh": "disabled", **AMBIENT}, {}, False),
        ({"mycel.io/mesh": "disabled", **INJECTION}, {}, False),
        ({"mycel.io/mesh": "disabled"}, MYCEL, True),
        ({"mycel.io/mesh": "disabled"}, AMBIENT, True),
        # revisions
        ({"istio.io/rev": "default"}, {}, True),
        ({"istio.io/rev": "mycel"}, {}, True),
        ({"istio.io/rev": "canary"}, {}, False),
        ({"istio.io/rev": "default"}, {INJECT: "false"}, False),
        ({"istio.io/rev": "canary"}, {"istio.io/rev": "default"}, False),
        ({}, {"istio.io/rev": "default"}, True),
        ({}, {"istio.io/rev": "canary", INJECT: "true"}, False),
        ({"istio.io/rev": "canary", **INJECTION}, {}, True),
        ({"istio.io/rev": "canary", **AMBIENT}, {}, True),
    ],
)
def test_labels(labels: dict[str, str], own: dict[str, Any], expected: bool) -> None:
    assert enrolled(compile_all(namespace("default", **labels), pod("p", **own))) is expected


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        (LINKERD, {}, True),
        ({"linkerd.io/inject": "ingress"}, {}, True),
        ({"linkerd.io/inject": "disabled"}, {}, False),
        ({}, LINKERD, True),
        (LINKERD, {"linkerd.io/inject": "disabled"}, False),
        ({}, {INJECT: "true"}, True),
    ],
)
def test_annotations(outer: dict[str, str], inner: dict[str, str], expected: bool) -> None:
    place, one = namespace(), pod("p")
    place["metadata"]["annotations"], one["metadata"]["annotations"] = outer, inner
    assert enrolled(compile_all(place, one)) is expected


def test_the_label_goes_before_the_annotation_of_its_name() -> None:
    one = pod("p", **INJECTED)
    one["metadata"]["annotations"] = {INJECT: "false"}
    assert enrolled(compile_all(namespace("default", **INJECTION), one))


def with_container(part: str, name: str) -> Manifest:
    one = pod("p")
    one["spec"].setdefault(part, []).append({"name": name, "restartPolicy": "Always"})
    return one


def with_annotation() -> Manifest:
    one = pod("p")
    one["metadata"]["annotations"] = {"sidecar.istio.io/status": "{}"}
    return one


@pytest.mark.parametrize(
    ("one", "what"),
    [
        (with_container("containers", "istio-proxy"), "container istio-proxy"),
        (with_container("containers", "linkerd-proxy"), "container linkerd-proxy"),
        (with_container("initContainers", "istio-proxy"), "container istio-proxy"),
        (with_container("initContainers", "linkerd-proxy"), "container linkerd-proxy"),
        (with_annotation(), "annotation sidecar.istio.io/status"),
    ],
)
def test_a_sidecar_keeps_a_pod_out_and_is_named(one: Manifest, what: str) -> None:
    snapshot = compile_all(namespace("default", **INJECTION), one)
    assert not enrolled(snapshot)
    assert f"it has a sidecar already ({what}): it stays outside" in messages(snapshot, "Pod default/p")
    assert "warning" in messages(snapshot, "Pod default/p")
    asked_for_nothing = compile_all(namespace(), one)
    assert not enrolled(asked_for_nothing)
    assert messages(asked_for_nothing) == ""


def test_what_a_sidecar_needed_at_the_start_is_no_sidecar() -> None:
    assert enrolled(
        compile_all(namespace("default", **MYCEL), with_container("initContainers", "istio-init"))
    )


@pytest.mark.parametrize("own", [{}, MYCEL])
def test_the_nodes_own_network(own: dict[str, Any]) -> None:
    host = pod("p", "192.168.0.1", **own)
    host["spec"]["hostNetwork"] = True
    snapshot = compile_all(namespace("default", **MYCEL), host)
    assert not enrolled(snapshot)
    assert "its network is the node's (hostNetwork)" in messages(snapshot, "Pod default/p")


@pytest.mark.parametrize("name", ["kube-system", "mycel-system"])
def test_namespaces_that_are_always_outside(name: str) -> None:
    settings = Settings(outside=frozenset({"kube-system", "mycel-system"}))
    snapshot = compile_all(namespace(name, **MYCEL), pod("p", ns=name), settings=settings)
    assert not enrolled(snapshot)
    assert "always outside of the mesh, whatever its labels say" in messages(snapshot, f"Namespace {name}")
    assert messages(snapshot, "Pod") == ""
    own = compile_all(namespace(name), pod("p", ns=name, **AMBIENT), settings=settings)
    assert not enrolled(own)
    assert f"namespace {name} is always outside" in messages(own, f"Pod {name}/p")


def test_another_revision_is_said() -> None:
    snapshot = compile_all(namespace("default", **{"istio.io/rev": "1-22"}), pod("p"))
    assert "revision 1-22 is another control plane's" in messages(snapshot, "Namespace default")
    both = compile_all(namespace("default", **{"istio.io/rev": "1-22"}, **AMBIENT), pod("p"))
    assert messages(both) == ""


def test_namespaces_that_do_not_ask_are_told_to_the_nodes():
    """For plugins whose agent is away; one that is always outside is outside whatever its labels say."""
    settings = Settings(outside=("kube-system",))
    objects: list[Manifest] = [
        namespace("plain"),
        namespace("inside", **MYCEL),
        namespace("out", **{"mycel.io/mesh": "disabled"}),
        namespace("kube-system", **MYCEL),
    ]
    config = compile_all(*objects, settings=settings).resources["mesh"]
    assert isinstance(config, MeshConfig)
    assert config.outside_namespaces == ("kube-system", "out", "plain")
