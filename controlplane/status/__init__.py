"""What becomes of every policy object, and telling it: ``.status`` or Events by the leader, ``/debug/status`` on every replica.

Which objects are meant says :mod:`~controlplane.status.kinds`; since when which content is in force here,
:mod:`~controlplane.status.programming`; what the other controllers' clients have, :mod:`~controlplane.status.replicas`. From that
:mod:`~controlplane.status.board` makes a verdict for each object, as often as :mod:`~controlplane.status.keeper` asks for it.
:mod:`~controlplane.status.conditions` gives verdicts the shape that a CRD has, :mod:`~controlplane.status.writer` writes.
"""
