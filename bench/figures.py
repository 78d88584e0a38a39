"""Figures of the mesh that are no rows: how long a change takes, how much memory it needs, what is plain on the wire."""

from __future__ import annotations

import secrets
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import nginx
from bench.stats import percentile
from bench.testbed import CHANGING, Pods, Testbed, base, changing
from lab.capture import Capture
from lab.lab import COMPONENTS, Lab
from lab.place import PYTHON
from lab.pod import Pod

Json = dict[str, Any]

_PROBER = Path(__file__).with_name("prober.py")
_CHANGES = 50
#: Seconds after which a change that is not in force counts as never enforced.
_GIVE_UP = 10.0
_HBONE = 15008


class FigureError(Exception):
    """A figure could not be measured."""


def measure(testbed: Testbed, *, say: Callable[[str], None]) -> Json:
    """All figures, from the lab with the mesh (and one without, as the capture's control, if it is there).

    :raises FigureError: with what went wrong.
    """
    if testbed.mesh is None or testbed.mesh_pods is None:
        raise FigureError("the figures need the lab with the mesh")
    say("memory")
    memory = pss(testbed.mesh)
    say("bytes between nodes")
    plain = _plain_bytes(testbed)
    times = policy_changes(testbed, say=say)
    return {
        "policy_change_p99_ms": round(percentile(times, 99), 1),
        "policy_change_p50_ms": round(percentile(times, 50), 1),
        "policy_changes": len(times),
        "pss_mb": memory,
        "plain_bytes_between_nodes": plain,
    }


# -- memory


def pss(lab: Lab) -> dict[str, float]:
    """Proportional set size in MB (10^6 bytes) by component: the largest of the nodes'."""
    found = {"controlplane": _pss_of([lab.process("controlplane").pid])}
    for component in COMPONENTS:
        found[component] = max(_pss_of(lab.processes_of(node.name, component)) for node in lab.nodes)
    return {component: round(size / 1e6, 1) for component, size in found.items()}


def _pss_of(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


# -- bytes on the wire


def _plain_bytes(testbed: Testbed) -> int:
    """In the mesh, by service and by pod address, at L4 and through l7proxy; the control is the lab without a mesh."""
    lab, pods = testbed.mesh, testbed.mesh_pods
    assert lab is not None
    assert pods is not None
    if testbed.plain is not None and testbed.plain_pods is not None:
        control, _ = payload_bytes(
            testbed.plain, testbed.plain_pods, [f"{testbed.plain_pods.far.address}:{nginx.PORT}"]
        )
        if control == 0:
            raise FigureError(
                "the capture sees nothing where there is no mesh: it would prove nothing about Mycel"
            )
    lab.apply([*base(), *changing(allowed=True, to="far")], name=CHANGING)
    lab.settle()
    targets = [f"{testbed.service_address(name)}:80" for name in ("far", "routed")]
    plain, tunnelled = payload_bytes(lab, pods, [*targets, f"{pods.far.address}:{nginx.PORT}"])
    if tunnelled == 0:
        raise FigureError(
            "the capture saw no HBONE, though the requests were answered: they went another way"
        )
    lab.apply([*base(), *changing(allowed=True, to="near")], name=CHANGING)
    lab.settle()
    return plain


def payload_bytes(lab: Lab, pods: Pods, targets: list[str]) -> tuple[int, int]:
    """Requests from client to the other node's server, under a capture: as :func:`count_payload`."""
    marker = secrets.token_hex(16)
    with lab.capture("node1") as capture:
        for target in targets * 10:
            answered = pods.client.run(
                [
                    "/usr/bin/curl",
                    "-sS",
                    "--max-time",
                    "5",
                    "-H",
                    f"X-Marker: {marker}",
                    f"http://{target}/{marker}",
                ]
            ).stdout
            if answered != nginx.body("far"):
                raise FigureError(f"{target} is to be the server on the other node, and answers {answered!r}")
        time.sleep(0.2)  # what is still under way
    return count_payload(capture, {pods.client.address, pods.far.address}, marker.encode())


def count_payload(capture: Capture, pods: set[str], marker: bytes) -> tuple[int, int]:
    """Bytes of TCP payload between these pods: those in the clear, and those of HBONE.

    In the clear is whatever is not on HBONE's port, or is no TLS there, or holds the marker.
    """
    plain = tunnelled = 0
    tls: dict[tuple[str, int, str, int], bool] = {}
    for source, source_port, destination, destination_port, payload in capture.segments():
        if not payload or not {source, destination} <= pods:
            continue
        if _HBONE not in (source_port, destination_port):
            plain += len(payload)
            continue
        # A connection that was open before the capture begins with a record of application data (23), a new one with a
        # handshake (22).
        flow = (source, source_port, destination, destination_port)
        is_tls = tls.setdefault(flow, payload[0] in (20, 21, 22, 23) and payload[1:2] == b"\x03")
        if not is_tls or marker in payload:
            plain += len(payload)
        else:
            tunnelled += len(payload)
    return plain, tunnelled


# -- how long a change takes


class _Prober:
    """One prober in a pod, and the changes that it saw: (nanoseconds, outcome)."""

    def __init__(self, pod: Pod, host: str, port: int, name: str, authority: str) -> None:
        command = [PYTHON, "-I", str(_PROBER), host, str(port), authority]
        self._process = pod.popen(command, stderr=subprocess.STDOUT)
        self._seen: list[tuple[int, str]] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name=f"prober {name}", daemon=True)
        self._thread.start()
        self.name = name

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            when, _, outcome = line.strip().partition(" ")
            with self._changed:
                self._seen.append((int(when), outcome) if when.isdigit() else (0, line.strip()))
                self._changed.notify_all()

    def wait_for(self, outcome: str, deadline: float) -> int:
        """Nanoseconds at which the last change to ``outcome`` was seen.

        :raises FigureError: it is not so at the deadline (monotonic seconds).
        """
        with self._changed:
            while not self._seen or self._seen[-1][1] != outcome:
                left = deadline - time.monotonic()
                if left <= 0:
                    last = self._seen[-1][1] if self._seen else "nothing"
                    raise FigureError(f"{self.name}: {last!r} instead of {outcome!r} after {_GIVE_UP} s")
                self._changed.wait(left)
            return self._seen[-1][0]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join(5)


def policy_changes(testbed: Testbed, *, say: Callable[[str], None]) -> list[float]:
    """Milliseconds from a file's replacement until kernel, node proxy and l7proxy all enforce it, for each change.

    One file says whether the client may dial a port (seen on the same node, where the kernel judges, and on the other,
    where the node proxy does) and which server the routed service goes to (seen through l7proxy).
    """
    lab, pods = testbed.mesh, testbed.mesh_pods
    assert lab is not None
    assert pods is not None
    probers = {
        "near": _Prober(pods.client, pods.near.address, nginx.GUARDED, "kernel", "near"),
        "far": _Prober(pods.client, pods.far.address, nginx.GUARDED, "node proxy", "far"),
        "routed": _Prober(pods.client, testbed.service_address("routed"), 80, "l7proxy", "routed"),
    }
    times: list[float] = []
    try:
        _await(probers, allowed=True, to="near")
        for number in range(_CHANGES):
            allowed, to = (number % 2 == 1), ("near", "far")[(number + 1) % 2]
            time.sleep(0.05)  # changes do not come in step with anything of ours
            began = time.monotonic_ns()
            lab.apply([*base(), *changing(allowed=allowed, to=to)], name=CHANGING)
            times.append((_await(probers, allowed=allowed, to=to) - began) / 1e6)
            say(f"change {number + 1}/{_CHANGES}: {times[-1]:.0f} ms")
    finally:
        for prober in probers.values():
            prober.stop()
    return times


def _await(probers: dict[str, _Prober], *, allowed: bool, to: str) -> int:
    deadline = time.monotonic() + _GIVE_UP
    return max(
        probers["near"].wait_for("near" if allowed else "refused", deadline),
        probers["far"].wait_for("far" if allowed else "refused", deadline),
        probers["routed"].wait_for(to, deadline),
    )
