"""The real helm, as people run it, with a home of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

from deploy.chart import FOLDER
from lab.kubernetes import programs


class HelmError(Exception):
    """Helm ended with another status than 0; its text is what it wrote."""


def helm(*arguments: object, home: Path, kubeconfig: Path | None = None) -> str:
    """:raises HelmError: it failed."""
    places = {name: str(home) for name in ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME", "HOME")}
    environment = os.environ | places | ({"KUBECONFIG": str(kubeconfig)} if kubeconfig else {})
    done = subprocess.run(
        [str(programs.folder() / "helm"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise HelmError(done.stdout + done.stderr)
    return done.stdout


def rendered(*arguments: object, home: Path, namespace: str) -> list[dict[str, Any]]:
    """The objects of ``helm template``."""
    text = helm("template", "mycel", FOLDER, "--namespace", namespace, *arguments, home=home)
    return [document for document in yaml.safe_load_all(text) if document]
