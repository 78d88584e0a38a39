"""The claims of ``make demo-kubernetes`` are about what is seen: on a cluster on which one is not true, it is not told.

(What the whole story makes of that is in tests/lab/test_kubernetes_demo.py.)
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab.demo import Story
from lab.kubernetes import Cluster
from lab.kubernetes.demo import ECHO, LABEL, Demo
from lab.kubernetes.mesh import Mesh
from lab.processes import wait_until


@pytest.fixture
def demo(lab_cluster: Cluster, mesh: Mesh) -> Iterator[Demo]:
    try:
        yield Demo(lab_cluster)
    finally:
        kubectl = lab_cluster.kubectl
        kubectl("label", "namespace", "default", LABEL.replace("=enabled", "-"), check=False)
        kubectl("delete", "namespace", "outside", "--wait=false", check=False)
        for kind in ("deployment", "peerauthentication"):
            kubectl("delete", kind, "--all", "-n", "default", check=False)
        for kind, names in (("service", ("web-app", "ledger")), ("serviceaccount", ("web-app", *NAMES))):
            kubectl("delete", kind, *names, "-n", "default", "--ignore-not-found", check=False)


NAMES = ("ledger", "client", "teller")


def test_claims_hold_where_they_are_true_and_not_where_they_are_not(demo: Demo) -> None:
    true = Story()
    true.chapter("running pods join", demo.enrol)
    true.chapter("a stranger is refused", demo.strict)
    assert true.summary() == 0

    # The stranger is none any more: whoever still claims that it is refused has not looked.
    demo.cluster.kubectl("label", "namespace", "outside", LABEL)
    ledger = demo.address("ledger")
    wait_until(
        lambda: demo.echoes(demo.stranger, ledger, ECHO), 60.0, "the stranger has joined", interval=0.5
    )
    untrue = Story()
    untrue.chapter("a stranger is refused", demo.strict)
    assert untrue.summary() == 1
