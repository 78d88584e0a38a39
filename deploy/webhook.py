"""The validating webhook's registration: which objects the API server shows to a controller before it stores them."""

from __future__ import annotations

from deploy import parts
from deploy.parts import CONTROLPLANE, Json
from deploy.rbac import POLICY
from deploy.values import Values

#: Of the configuration object; there is one for a cluster.
NAME = "mycel"
PATH = "/validate"


def configuration(values: Values, namespace: str) -> Json:
    """Without ``caBundle``, which the leading controller fills and keeps right."""
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": parts.metadata(NAME, CONTROLPLANE),
        "webhooks": [
            {
                "name": "validate.mycel.io",
                "admissionReviewVersions": ["v1"],
                "clientConfig": {
                    "service": {"name": CONTROLPLANE, "namespace": namespace, "path": PATH, "port": 443}
                },
                "rules": [
                    {
                        "apiGroups": [group],
                        "apiVersions": ["*"],
                        "operations": ["CREATE", "UPDATE"],
                        "resources": list(kinds),
                        "scope": "*",
                    }
                    for group, kinds in POLICY.items()
                ],
                "failurePolicy": values.webhook.failure_policy,
                "matchPolicy": "Equivalent",
                "sideEffects": "None",
                "timeoutSeconds": values.webhook.timeout_seconds,
            }
        ],
    }
