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
_CLUSTER_IP = {**_STRING, "pattern": rf"^None$|{_IP_PATTERN}"}

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
                    "ports": _list(
                        _open(
                            {
                                "port": _PORT,
                                "name": _STRING,
                                "protocol": {**_STRING, "enum": ["TCP", "UDP", "SCTP"]},
                                "appProtocol": {**_STRING, "nullable": True},
                                "targetPort": {"anyOf": [_PORT, {**_STRING, "minLength": 1}]},
                            },
                            required=["port"],
                        )
                    ),
                }
            )
        },
        required=["spec"],
    ),
    "/Pod": _open(
        {
            "metadata": _open({"uid": {**_STRING, "minLength": 1}}, required=["uid"]),
            "spec": _open(
                {
                    "nodeName": _STRING,
                    "serviceAccountName": _STRING,
                    "hostNetwork": {"type": "boolean"},
                    "containers": _list(
                        _open({"ports": _list(_open({"containerPort": _PORT, "name": _STRING}))}),
                    ),
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
}
