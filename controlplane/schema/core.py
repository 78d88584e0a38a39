"""Schemas of the Kubernetes kinds that the compiler reads: the fields that it reads, and nothing else of them.

Other fields are left alone (the API server has judged them), so that a manifest written by a cluster is accepted whole.
"""

from __future__ import annotations

from typing import Any

_STRING: dict[str, Any] = {"type": "string"}
_STRINGS: dict[str, Any] = {"type": "object", "additionalProperties": _STRING}
_PORT: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": 65535}
_NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
_LABEL_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
_IP_PATTERN = r"^[0-9a-fA-F:.]*$"


def _open(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "x-kubernetes-preserve-unknown-fields": True, **more}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "nullable": True}


METADATA = _open(
    {
        "name": {**_STRING, "minLength": 1, "maxLength": 253, "pattern": _NAME_PATTERN},
        "namespace": {**_STRING, "minLength": 1, "maxLength": 63, "pattern": _LABEL_PATTERN},
        "labels": {**_STRINGS, "nullable": True},
        "annotations": {**_STRINGS, "nullable": True},
        "uid": _STRING,
        "creationTimestamp": {**_STRING, "nullable": True},
        "deletionTimestamp": {**_STRING, "nullable": True},
        "ownerReferences": _list(_open({"kind": _STRING, "name": _STRING}, required=["kind", "name"])),
    },
    required=["name"],
)

_ADDRESS = {**_STRING, "pattern": _IP_PATTERN}
_TRANSPORT: dict[str, Any] = {**_STRING, "enum": ["TCP", "UDP", "SCTP"]}
_AFFINITY_SECONDS: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": 86400, "nullable": True}
_CONTAINERS = _list(
    _open(
        {
            "name": _STRING,
            "restartPolicy": {**_STRING, "nullable": True},
            "ports": _list(_open({"containerPort": _PORT, "name": _STRING, "protocol": _TRANSPORT})),
        }
    )
)
_CONDITION = {"type": "boolean", "nullable": True}
_CLUSTER_IP = {**_STRING, "pattern": rf"^None$|{_IP_PATTERN}"}

_NODE_PORT: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 65535}

# Of NetworkPolicy every field counts: one that is misspelt, or that is newer than this, must not be ignored.
_LABEL_NAME = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)"
LABEL_KEY = rf"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?{_LABEL_NAME}$"
_LABEL_KEY: dict[str, Any] = {**_STRING, "pattern": LABEL_KEY}
_LABEL_VALUE: dict[str, Any] = {**_STRING, "pattern": rf"^{_LABEL_NAME}?$"}


def _closed(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, **more}


def _selector(**more: Any) -> dict[str, Any]:
    expression = _closed(
        {
            "key": _LABEL_KEY,
            "operator": {**_STRING, "enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
            "values": _list(_LABEL_VALUE),
        },
        required=["key", "operator"],
    )
    labels = {"type": "object", "additionalProperties": _LABEL_VALUE, "nullable": True}
    return _closed({"matchLabels": labels, "matchExpressions": _list(expression)}, **more)


def _rules(side: str) -> dict[str, Any]:
    block = _closed({"cidr": _STRING, "except": _list(_STRING)}, required=["cidr"], nullable=True)
    peer = _closed(
        {
            "podSelector": _selector(nullable=True),
            "namespaceSelector": _selector(nullable=True),
            "ipBlock": block,
        }
    )
    port = _closed(
        {
            "protocol": {**_TRANSPORT, "nullable": True},
            "port": {"anyOf": [_PORT, {**_STRING, "minLength": 1}], "nullable": True},
            "endPort": {**_PORT, "nullable": True},
        }
    )
    return _list(_closed({"ports": _list(port), side: _list(peer)}))


_NETWORK_POLICY = _open(
    {
        "spec": _closed(
            {
                "podSelector": _selector(nullable=True),
                "ingress": _rules("from"),
                "egress": _rules("to"),
                "policyTypes": _list({**_STRING, "enum": ["Ingress", "Egress"]}),
            }
        )
    },
    required=["spec"],
)

KINDS: dict[str, dict[str, Any]] = {
    "/Namespace": _open({}),
    "/ServiceAccount": _open({}),
    "/Service": _open(
        {
            "spec": _open(
                {
                    "type": {
                        **_STRING,
                        "enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"],
                    },
                    "clusterIP": _CLUSTER_IP,
                    "clusterIPs": _list(_CLUSTER_IP),
                    "selector": {**_STRINGS, "nullable": True},
                    "publishNotReadyAddresses": {"type": "boolean"},
                    "externalName": _STRING,
                    "sessionAffinity": {**_STRING, "enum": ["None", "ClientIP"]},
                    "sessionAffinityConfig": _open(
                        {"clientIP": _open({"timeoutSeconds": _AFFINITY_SECONDS}, nullable=True)},
                        nullable=True,
                    ),
                    "externalIPs": _list(_ADDRESS),
                    "internalTrafficPolicy": {**_STRING, "enum": ["Cluster", "Local"]},
                    "ports": _list(
                        _open(
                            {
                                "port": _PORT,
                                "name": _STRING,
                                "protocol": _TRANSPORT,
                                "appProtocol": {**_STRING, "nullable": True},
                                "nodePort": _NODE_PORT,
                                "targetPort": {"anyOf": [_PORT, {**_STRING, "minLength": 1}]},
                            },
                            required=["port"],
                        )
                    ),
                }
            ),
            "status": _open(
                {
                    "loadBalancer": _open(
                        {"ingress": _list(_open({"ip": {**_ADDRESS, "nullable": True}}))}, nullable=True
                    )
                },
                nullable=True,
            ),
        },
        required=["spec"],
    ),
    "/Node": _open(
        {
            "status": _open(
                {
                    "addresses": _list(
                        _open({"type": _STRING, "address": _STRING}, required=["type", "address"])
                    )
                },
                nullable=True,
            )
        }
    ),
    "networking.k8s.io/NetworkPolicy": _NETWORK_POLICY,
    "/Pod": _open(
        {
            "metadata": _open({"uid": {**_STRING, "minLength": 1}}, required=["uid"]),
            "spec": _open(
                {
                    "nodeName": _STRING,
                    "serviceAccountName": _STRING,
                    "hostNetwork": {"type": "boolean"},
                    "containers": _CONTAINERS,
                    "initContainers": _CONTAINERS,
                }
            ),
            "status": _open(
                {
                    "phase": _STRING,
                    "podIP": _ADDRESS,
                    "podIPs": _list(_open({"ip": _ADDRESS}, required=["ip"])),
                    "conditions": _list(
                        _open({"type": _STRING, "status": _STRING}, required=["type", "status"])
                    ),
                }
            ),
        },
        required=["spec"],
    ),
    "discovery.k8s.io/EndpointSlice": _open(
        {
            "addressType": {**_STRING, "enum": ["IPv4", "IPv6", "FQDN"]},
            "endpoints": _list(
                _open(
                    {
                        "addresses": _list(_STRING),
                        "nodeName": {**_STRING, "nullable": True},
                        "zone": {**_STRING, "nullable": True},
                        "conditions": _open(
                            {"ready": _CONDITION, "serving": _CONDITION, "terminating": _CONDITION},
                            nullable=True,
                        ),
                        "targetRef": _open(
                            {"kind": _STRING, "name": _STRING, "namespace": _STRING, "uid": _STRING},
                            nullable=True,
                        ),
                    },
                    required=["addresses"],
                )
            ),
            "ports": _list(
                _open(
                    {
                        "name": {**_STRING, "nullable": True},
                        "port": {**_PORT, "nullable": True},
                        "protocol": {**_TRANSPORT, "nullable": True},
                    }
                )
            ),
        },
        required=["addressType"],
    ),
}
