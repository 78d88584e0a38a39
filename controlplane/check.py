"""What is wrong with a folder of configuration, without a controller: the library behind ``mycel check --config DIR``."""

from __future__ import annotations

from pathlib import Path

from controlplane.compiler import compile_snapshot, validate
from controlplane.model.findings import Finding, Severity, from_fault
from controlplane.model.world import Settings
from controlplane.source.folder import Folder
from controlplane.standin import in_force

__all__ = ["Finding", "Severity", "check"]


def check(config: Path, trust_domain: str = "cluster.local") -> list[Finding]:
    """All findings, the worst first: those of files and single objects, then those of objects together.

    There is no last good state here: an object that is refused counts as absent, a policy as one that refuses.
    """
    state = Folder(config, validate).load()
    objects, strict = in_force(state)
    snapshot = compile_snapshot(objects, Settings(trust_domain))
    findings = [from_fault(f) for f in (*state.faults, *strict)] + list(snapshot.findings)
    return sorted(findings, key=lambda f: -f.severity)
