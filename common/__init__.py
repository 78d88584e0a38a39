"""What every process shares: structured logs, task start, the admin server, local RPC framing.

Owns no policy and no state of the mesh, and imports no other package of the project.
"""
