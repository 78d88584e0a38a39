"""Who may do what with the Kubernetes API: service accounts, roles and their bindings. Each rule says why.

Node proxy and l7proxy have an account, which is who they are for our controllers, and no right at all. What is read follows
from the source's own table of kinds; no Secret or ConfigMap of others is: whoever wants one to be used gives a Role for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from controlplane.source.kinds import BUILT_IN, CUSTOM, Kind
from deploy import parts
from deploy.parts import AGENT, CONTROLPLANE, L7PROXY, NODEPROXY, Json

_READ: Final = ["get", "list", "watch"]

#: Kinds whose definitions have no status to write; what became of such an object is told by an Event.
WITHOUT_STATUS: Final = frozenset(
    {
        "authorizationpolicies.policy.linkerd.io",
        "httproutegroups.specs.smi-spec.io",
        "meshtlsauthentications.policy.linkerd.io",
        "networkauthentications.policy.linkerd.io",
        "referencegrants.gateway.networking.k8s.io",
        "serverauthorizations.policy.linkerd.io",
        "servers.policy.linkerd.io",
        "serviceprofiles.linkerd.io",
        "tcproutes.specs.smi-spec.io",
        "trafficsplits.split.smi-spec.io",
        "traffictargets.access.smi-spec.io",
        "udproutes.specs.smi-spec.io",
    }
)


def _by_group(kinds: Iterable[Kind]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for kind in kinds:
        groups.setdefault(kind.group, []).append(kind.plural)
    return {group: tuple(sorted(plurals)) for group, plurals in groups.items()}


#: Kinds that configure the mesh, by group: read when their definition is installed.
POLICY: Final = _by_group(CUSTOM)
_WITH_STATUS: Final = _by_group(kind for kind in CUSTOM if kind.definition not in WITHOUT_STATUS)


def accounts(namespace: str) -> list[Json]:
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": parts.metadata(name, name, namespace=namespace),
        }
        for name in (CONTROLPLANE, AGENT, NODEPROXY, L7PROXY)
    ]


def rules(namespace: str) -> list[Json]:
    """Roles and bindings, cluster-wide ones first."""
    return [
        _role("ClusterRole", CONTROLPLANE, _controlplane_cluster()),
        _binding("ClusterRoleBinding", CONTROLPLANE, namespace),
        _role("Role", CONTROLPLANE, _controlplane_own(), namespace),
        _binding("RoleBinding", CONTROLPLANE, namespace),
        _role("Role", AGENT, _agent_own(), namespace),
        _binding("RoleBinding", AGENT, namespace),
    ]


def _controlplane_cluster() -> list[Json]:
    return [
        # What runs where, as whom, in which zone and namespace.
        *(_rule(group, list(kinds), _READ) for group, kinds in _by_group(BUILT_IN).items()),
        # Which kinds there are, also when their definition comes or goes later.
        _rule("apiextensions.k8s.io", ["customresourcedefinitions"], _READ),
        *(_rule(group, list(kinds), _READ) for group, kinds in POLICY.items()),
        # What became of an object is said in its status, and where that is not possible in an Event.
        *(
            _rule(group, [f"{kind}/status" for kind in kinds], ["patch"])
            for group, kinds in _WITH_STATUS.items()
        ),
        _rule("events.k8s.io", ["events"], ["create"]),
        # Who shows us a token.
        _rule("authentication.k8s.io", ["tokenreviews"], ["create"]),
        # The certificate by which the API server knows our webhook.
        _rule(
            "admissionregistration.k8s.io",
            ["validatingwebhookconfigurations"],
            ["get", "patch"],
            ["mycel"],
        ),
    ]


def _controlplane_own() -> list[Json]:
    return [
        # The mesh's root key: written once by the first controller, only if nobody was faster.
        _rule("", ["secrets"], ["get", "update"], [parts.CA_SECRET]),
        # The bundle by which agents and proxies know us.
        _rule("", ["configmaps"], ["get", "patch"], [parts.ROOTS]),
        # Who leads.
        _rule("coordination.k8s.io", ["leases"], ["get", "update"], [parts.LEASE]),
    ]


def _agent_own() -> list[Json]:
    # Whether its DaemonSet is gone or going, in which case it takes itself off the node.
    return [_rule("apps", ["daemonsets"], ["get"], [AGENT])]


def _rule(group: str, resources: list[str], verbs: list[str], names: list[str] | None = None) -> Json:
    made: dict[str, Any] = {"apiGroups": [group], "resources": resources, "verbs": verbs}
    return made | ({"resourceNames": names} if names else {})


def _role(kind: str, name: str, rules: list[Json], namespace: str = "") -> Json:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": kind,
        "metadata": parts.metadata(name, name, namespace=namespace),
        "rules": rules,
    }


def _binding(kind: str, name: str, namespace: str) -> Json:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": kind,
        "metadata": parts.metadata(name, name, namespace=namespace if kind == "RoleBinding" else ""),
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": kind.removesuffix("Binding"),
            "name": name,
        },
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
    }
