"""The agent's memory on a node with many pods in the mesh, and the kernel's for its maps beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import Lab
from tests.requirements import SOAK

pytestmark = [pytest.mark.privileged, pytest.mark.soak, pytest.mark.timeout(600 if SOAK else 120)]

PODS = 120 if SOAK else 12
#: Bytes: what it may take, and for each pod more.
BAR, EACH = 60_000_000, 10 * 1024


def test_an_agent_with_many_pods_stays_below_its_bar(lab: Lab, record_property):
    lab.namespace("memory")
    pods = [lab.pod(f"m{number}", node="node1", namespace="memory") for number in range(PODS)]
    lab.settle()
    pids = lab.processes_of("node1", "agent")
    pss = sum(
        int(line.split()[1]) * 1024
        for pid in pids
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        if line.startswith("Pss:")
    )
    maps = lab.metrics("node1", "agent").total("mycel_map_memory_bytes")
    record_property("agent_pss_mb", pss / 1e6)
    record_property("maps_mb", maps / 1e6)
    print(f"\n{PODS} pods: agent {pss / 1e6:.1f} MB (PSS), its maps {maps / 1e6:.1f} MB of the kernel's")
    assert maps > 1_000_000
    assert pss <= BAR + EACH * PODS
    for pod in pods:
        pod.delete()
