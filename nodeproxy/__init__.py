"""The node proxy: carries enrolled TCP between nodes over HBONE (HTTP/2 CONNECT in mutual TLS 1.3).

Owns the workload keys of its node, in memory only, the connections to other nodes and the verification of their
peers' identities. It never parses what it carries and has no capabilities: sockets come from the agent.

From the outside in:

==================  ==========================================================================================
``__main__``        command line, threads (data loop; gRPC; admin HTTP), signals
``node``            the parts put together; captured connections; what a change of the mesh touches
``tunnel``          outbound: destination, certificate, connection, CONNECT
``inbound``         the HBONE server: authority, identity, policy, delivery
``handoff``         streams that l7proxy or a real Envoy hand over (``api`` is the contract)
``pool``            which stream goes on which connection
``link``            one HBONE connection: socket, TLS, HTTP/2
``relay``, ``pair`` an application's socket joined with a stream, or with another socket: the hot path
``h2core``          HTTP/2 without sockets: receiving; ``h2sending``, ``h2frames``, ``h2headers`` beside it
``tls``             contexts, and who the peer is
``certificates``    the pods' certificates: asked for, renewed, waited for
``mesh``            what the controller says, and the verdicts that follow
``controller``      the controller's client (gRPC, a thread of its own)
``agent_client``    the agent's client: pods, listeners, a stock of sockets
``accounting``      ``istio_tcp_*`` and the log line of each tunnel
``loop``            epoll, timers, one flush per turn
==================  ==========================================================================================
"""
