"""The L7 proxy: an xDS client that routes, retries and balances HTTP requests.

Owns the HTTP codecs, routing, upstream pools and the access log. It holds no workload keys and no capabilities: sockets come
from the agent, and encryption between nodes is the node proxy's.

Where to look, in the order in which a request goes:

=======================================  ==================================================================================
:mod:`~l7proxy.xds`, ``resources``       the controller's resources: subscribed, acknowledged, kept, joined into a ``Config``
``convert``, ``convert_routes``          each resource checked and converted before anything live is touched
:mod:`~l7proxy.model`                    the frozen configuration
:mod:`~l7proxy.agent_client`, ``pods``   listeners and sockets in pods' namespaces
:mod:`~l7proxy.downstream`, ``http1``    an application's connection; the HTTP/1.1 core without sockets
:mod:`~l7proxy.stream`, ``states``       one request: routing, attempts, timeouts, response
``matcher``, ``balancer``, ``retry``     its decisions, without side effects
``pool``, ``connector``, ``upstream``    connections to endpoints, straight or through the node proxy
:mod:`~l7proxy.headers`                  the heads that are written, in both directions
``record``, ``metrics``, ``accesslog``   what is known of it in the end
:mod:`~l7proxy.errors`                   what can go wrong, with status and response flag
=======================================  ==================================================================================
"""
