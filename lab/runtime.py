"""What a container runtime does to networks: the CNI specification's "Network Configuration Lists", as libcni does it.

ADD runs the plugins in order, each with the result of the one before; DEL runs them in reverse with the cached result and
forgets it; CHECK runs in order with the cached result. The cache has libcni's form (``cniCacheV1``). Knows plugins only by
what the specification says of them, ours too.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab import cgroups, namespaces
from lab.errors import LabError

IFNAME = "eth0"
#: Seconds for one plugin call; ours waits up to 15 for the agent.
PLUGIN_TIMEOUT = 30.0


class CniError(LabError):
    """A plugin answered with an error object."""

    def __init__(self, plugin: str, command: str, error: Mapping[str, Any]) -> None:
        self.plugin = plugin
        self.command = command
        self.code = int(error.get("code", 0))
        self.text = str(error.get("msg", ""))
        self.details = str(error.get("details", ""))
        super().__init__(
            f"{command} by plugin {plugin}: error {self.code}: {self.text} {self.details}".rstrip()
        )


class Runtime:
    """Calls the CNI chain of one node.

    :param root: the node's root as this process sees it (``/proc/PID/root``).
    :param binaries: folder of plugins (``CNI_PATH``), the same path inside and outside of the node.
    :param cgroup: where plugins run.
    """

    def __init__(self, *, root: Path, net: Path, mount: Path, binaries: Path, cgroup: Path) -> None:
        self._root = root
        self._binaries = binaries
        self._enter = [*cgroups.joining(cgroup), *namespaces.entering(net=net, mount=mount)]

    def configuration(self) -> dict[str, Any]:
        """The node's network: the first list by name in ``/etc/cni/net.d``, as containerd and CRI-O choose it."""
        folder = self._root / "etc/cni/net.d"
        for path in sorted(folder.glob("*.conflist")):
            loaded: dict[str, Any] = json.loads(path.read_text())
            return loaded
        raise LabError(f"no network configuration in {folder}")

    def add(self, container: str, netns: str, args: Mapping[str, str]) -> dict[str, Any]:
        """Connect a container; ``netns`` is a path inside the node. A failed ADD is undone by DEL, as runtimes do.

        :raises CniError: what the plugin answered.
        """
        configuration = self.configuration()
        result: dict[str, Any] | None = None
        try:
            for plugin in configuration["plugins"]:
                answer = self._call("ADD", configuration, plugin, container, netns, args, result)
                if answer is None:
                    raise LabError(f"ADD by plugin {plugin['type']}: no result")
                result = answer
        except LabError:
            self._delete(configuration, container, netns, args, None)
            raise
        if result is None:
            raise LabError(f"network {configuration['name']} has no plugins")
        cache = self._cache(configuration["name"], container)
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(
            json.dumps(
                {
                    "kind": "cniCacheV1",
                    "containerId": container,
                    "config": configuration,
                    "ifName": IFNAME,
                    "networkName": configuration["name"],
                    "netns": netns,
                    "cniArgs": [[key, value] for key, value in args.items()],
                    "result": result,
                }
            )
        )
        return result

    def check(self, container: str) -> None:
        """:raises CniError: the container is no longer connected as the chain left it."""
        cached = self._cached(container)
        args = dict(cached["cniArgs"])
        for plugin in cached["config"]["plugins"]:
            self._call("CHECK", cached["config"], plugin, container, cached["netns"], args, cached["result"])

    def delete(self, container: str, netns: str, args: Mapping[str, str]) -> None:
        """Disconnect a container, also one that was never, or is no longer, connected."""
        configuration = self.configuration()
        cache = self._cache(configuration["name"], container)
        result = None
        if cache.exists():
            cached = json.loads(cache.read_text())
            configuration, result = cached["config"], cached["result"]
        self._delete(configuration, container, netns, args, result)
        cache.unlink(missing_ok=True)

    def _delete(
        self,
        configuration: dict[str, Any],
        container: str,
        netns: str,
        args: Mapping[str, str],
        result: dict[str, Any] | None,
    ) -> None:
        for plugin in reversed(configuration["plugins"]):
            self._call("DEL", configuration, plugin, container, netns, args, result)

    def _call(
        self,
        command: str,
        configuration: dict[str, Any],
        plugin: dict[str, Any],
        container: str,
        netns: str,
        args: Mapping[str, str],
        previous: dict[str, Any] | None,
    ) -> dict[str, Any] | None:
        stdin = {**plugin, "cniVersion": configuration["cniVersion"], "name": configuration["name"]}
        if previous is not None:
            stdin["prevResult"] = previous
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container,
            "CNI_NETNS": netns,
            "CNI_IFNAME": IFNAME,
            "CNI_ARGS": ";".join(f"{key}={value}" for key, value in args.items()),
            "CNI_PATH": str(self._binaries),
        }
        name = plugin["type"]
        try:
            done = subprocess.run(
                [*self._enter, str(self._binaries / name)],
                input=json.dumps(stdin),
                env=environment,
                capture_output=True,
                text=True,
                timeout=PLUGIN_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{command} by plugin {name}: no answer in {PLUGIN_TIMEOUT} s") from error
        try:
            answer = json.loads(done.stdout) if done.stdout.strip() else None
        except ValueError as error:
            raise LabError(
                f"{command} by plugin {name}: not JSON: {done.stdout!r} {done.stderr!r}"
            ) from error
        if done.returncode != 0:
            raise CniError(
                name, command, answer or {"code": 0, "msg": done.stderr.strip() or "no error object"}
            )
        return answer

    def _cache(self, network: str, container: str) -> Path:
        return self._root / f"var/lib/cni/results/{network}-{container}-{IFNAME}"

    def _cached(self, container: str) -> dict[str, Any]:
        path = self._cache(self.configuration()["name"], container)
        try:
            cached: dict[str, Any] = json.loads(path.read_text())
        except OSError as error:
            raise LabError(f"container {container} was never added: {error}") from error
        return cached
