"""The controller's Deployment."""

from __future__ import annotations

from deploy import controlplane
from deploy.values import Values


def test_what_a_controller_writes_is_on_no_disk() -> None:
    """The root's key, and Secrets that the last good objects refer to."""
    spec = controlplane.deployment(Values(), "mycel-system")["spec"]["template"]["spec"]
    media = {v["name"]: v["emptyDir"].get("medium") for v in spec["volumes"] if "emptyDir" in v}
    mounts = {m["mountPath"]: media.get(m["name"]) for m in spec["containers"][0]["volumeMounts"]}
    assert mounts["/var/lib/mycel"] == mounts["/var/lib/mycel/ca"] == "Memory"
