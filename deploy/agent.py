"""The agent's DaemonSet: the one component with rights on the node, each named with its reason."""

from __future__ import annotations

from typing import Final

from deploy import parts
from deploy.parts import AGENT, Json
from deploy.values import Values

#: What the agent's container may do beyond a plain process, and why (capabilities(7)).
CAPABILITIES: Final = {
    "BPF": "load programs and create maps",
    "PERFMON": "programs that read kernel structures (iterators, socket accounts)",
    "NET_ADMIN": "attach programs to cgroups and network namespaces; rules and routes in pods' namespaces; abort connections",
    "SYS_ADMIN": "setns into pods' network namespaces; BTF of the running kernel by id",
    "SYS_PTRACE": "namespaces and cgroups of other users' processes under /proc (proxies, pods)",
    "CHOWN": "gives its proxies the folders and the socket that they share with it",
    "DAC_OVERRIDE": "files of the node and of pods that belong to other users",
}


def daemon_set(values: Values, namespace: str) -> Json:
    chosen = values.agent
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": parts.metadata(AGENT, AGENT, namespace=namespace),
        "spec": {
            "selector": {"matchLabels": parts.selector(AGENT)},
            "minReadySeconds": parts.MIN_READY,
            # No surge: one agent at a time holds the node's lock and admin port. While it is away the kernel goes on
            # judging, and the runtime repeats an ADD that found nobody.
            "updateStrategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 0, "maxUnavailable": chosen.max_unavailable},
            },
            "template": {
                "metadata": {"labels": parts.labels(AGENT)},
                "spec": {
                    "serviceAccountName": AGENT,
                    "priorityClassName": chosen.priority_class_name,
                    "hostNetwork": True,
                    "hostPID": True,
                    # Its controller is found by the cluster's DNS once that runs; it starts without.
                    "dnsPolicy": "ClusterFirstWithHostNet",
                    "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
                    "imagePullSecrets": values.image.pull_secrets,
                    "nodeSelector": parts.LINUX,
                    "tolerations": parts.EVERYTHING,
                    "terminationGracePeriodSeconds": 30,
                    "containers": [_container(values, namespace)],
                    "volumes": [
                        parts.host_folder("run", values.node.run_dir),
                        parts.host_folder("state", values.node.state_dir),
                        parts.host_folder("bpf", values.node.bpf_dir, create=False),
                        parts.host_folder("cgroup", "/sys/fs/cgroup", create=False),
                        parts.host_folder("netns", "/run/netns"),
                        parts.host_folder("cni-bin", values.cni.bin_dir),
                        parts.host_folder("cni-conf", values.cni.conf_dir),
                        {"name": "tmp", "emptyDir": {}},
                        parts.token_volume(),
                        parts.roots_volume(),
                    ],
                },
            },
        },
    }


def _container(values: Values, namespace: str) -> Json:
    return {
        "name": "agent",
        "image": f"{values.image.repository}/agent:{values.image.tag}",
        "imagePullPolicy": values.image.pull_policy,
        "command": ["mycel-agent"],
        "args": [
            "--node=$(NODE_NAME)",
            f"--run={values.node.run_dir}",
            f"--state={values.node.state_dir}",
            f"--pins={values.node.bpf_dir}/mycel",
            "--cgroup=auto",
            f"--controller={parts.controller_address(values, namespace)}",
            f"--roots={parts.ROOTS_FOLDER}/roots.pem",
            f"--credential={parts.TOKENS}/token",
            f"--admin=$(HOST_IP):{parts.AGENT_ADMIN}",
            "--prober=auto",
            f"--cni-bin=/host{values.cni.bin_dir}",
            f"--cni-conf=/host{values.cni.conf_dir}",
            f"--daemonset={namespace}/{AGENT}",
            f"--outside={','.join([*values.outside, namespace])}",
            f"--map-size={','.join(values.agent.map_sizes)}",
            f"--flow-log={values.agent.flow_log}",
            f"--splice={values.agent.splice}",
            f"--revoke-after={values.revoke_after}",
        ],
        "env": [
            parts.field("NODE_NAME", "spec.nodeName"),
            parts.field("HOST_IP", "status.hostIP"),
            *parts.logging(values),
        ],
        "readinessProbe": parts.ready(parts.AGENT_ADMIN),
        "resources": parts.resources(values.agent.resources),
        "securityContext": {
            "runAsUser": 0,
            "runAsGroup": 0,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"], "add": sorted(CAPABILITIES)},
            # A runtime's default profile refuses bpf(2), setns(2) and perf_event_open(2) to some or all of these
            # capabilities; which, differs between runtimes.
            "seccompProfile": {"type": "Unconfined"},
            "appArmorProfile": {"type": "Unconfined"},
        },
        "volumeMounts": [
            # Where the node has them: the CNI plugin, which runs there, is told of these paths.
            {"name": "run", "mountPath": values.node.run_dir},
            {"name": "state", "mountPath": values.node.state_dir},
            {"name": "bpf", "mountPath": values.node.bpf_dir},
            {"name": "cgroup", "mountPath": "/sys/fs/cgroup", "mountPropagation": "HostToContainer"},
            # Namespaces that the runtime mounts after this container has started have to appear in it.
            {"name": "netns", "mountPath": "/run/netns", "mountPropagation": "HostToContainer"},
            # At the node's own path below /host: the plugin's launcher names it.
            {"name": "cni-bin", "mountPath": f"/host{values.cni.bin_dir}"},
            {"name": "cni-conf", "mountPath": f"/host{values.cni.conf_dir}"},
            {"name": "tmp", "mountPath": "/tmp"},
            parts.token_mount(),
            parts.roots_mount(),
        ],
    }
