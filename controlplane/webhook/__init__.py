"""The validating webhook: what could not come into force is refused when it is written.

It judges objects alone, by the function that sources use; what needs other objects to be judged is a finding, and said in
status. It is a service to people, not what keeps the mesh safe: an object that comes past it is judged again when it is read.
"""

from controlplane.webhook.registration import Registration
from controlplane.webhook.server import WebhookServer

__all__ = ["Registration", "WebhookServer"]
