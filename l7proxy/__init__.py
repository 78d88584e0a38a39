"""The L7 proxy: an xDS client that routes, retries, balances and authorizes HTTP requests.

Owns the HTTP codecs, the filter chain, upstream pools and the access log. It holds no workload keys and no
capabilities: sockets come from the agent, and encryption between nodes is the node proxy's.
"""
