"""Which endpoint of a cluster serves an attempt: Envoy's round robin, random and least request.

Owns the turn of each cluster and the count of active requests; synchronous, no I/O. Its state outlives configurations,
so that a change elsewhere does not start every cluster at its first endpoint again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Set
from random import Random

from l7proxy.model import Cluster, Config, Endpoint, LbPolicy


class Balancer:
    def __init__(self, random: Random) -> None:
        self._random = random
        self._turn: dict[str, int] = {}
        self._schedules: dict[str, tuple[tuple[Endpoint, ...], tuple[Endpoint, ...]]] = {}
        #: active requests by endpoint key, kept for clusters of LEAST_REQUEST only
        self.active: defaultdict[str, int] = defaultdict(int)

    def pick(
        self, config: Config, cluster: Cluster, avoid: Set[str] = frozenset(), attempts: int = 1
    ) -> Endpoint | None:
        """An endpoint, or None: the cluster has none.

        ``avoid`` are keys of endpoints that were tried already; after ``attempts`` further draws one of them is taken
        (Envoy: host_selection_retry_max_attempts).
        """
        endpoints = config.endpoints.get(cluster.name)
        if not endpoints:
            return None
        endpoint = self._draw(cluster, endpoints)
        while avoid and endpoint.key in avoid and attempts > 0:
            endpoint = self._draw(cluster, endpoints)
            attempts -= 1
        return endpoint

    def keep(self, clusters: Container[str]) -> None:
        """Forget the turns of clusters that are not among these."""
        for turns in (self._turn, self._schedules):
            for name in [name for name in turns if name not in clusters]:
                del turns[name]

    def _draw(self, cluster: Cluster, endpoints: tuple[Endpoint, ...]) -> Endpoint:
        count = len(endpoints)
        if count == 1:
            return endpoints[0]
        if cluster.lb_policy is LbPolicy.ROUND_ROBIN:
            order = self._schedule(cluster.name, endpoints)
            turn = self._turn.get(cluster.name)
            if turn is None:
                turn = self._random.randrange(len(order))
            self._turn[cluster.name] = turn + 1
            return order[turn % len(order)]
        if cluster.lb_policy is LbPolicy.RANDOM:
            return self._weighted(endpoints)
        # Power of two choices (Envoy: choice_count 2, equal weights); weights bias the two draws.
        first, second = self._weighted(endpoints), self._weighted(endpoints)
        return first if self.active.get(first.key, 0) <= self.active.get(second.key, 0) else second

    def _weighted(self, endpoints: tuple[Endpoint, ...]) -> Endpoint:
        first = endpoints[0].weight
        if all(endpoint.weight == first for endpoint in endpoints):
            return endpoints[int(self._random.random() * len(endpoints))]
        return self._random.choices(endpoints, [endpoint.weight for endpoint in endpoints])[0]

    def _schedule(self, name: str, endpoints: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
        """One round of turns. Weighted endpoints are interleaved smoothly (as nginx does), in a round that sums the weights."""
        known = self._schedules.get(name)
        if known is not None and known[0] is endpoints:
            return known[1]
        weights = [endpoint.weight for endpoint in endpoints]
        order: tuple[Endpoint, ...] = endpoints
        if len(set(weights)) > 1:
            total = sum(weights)
            # A round of more than 10,000 turns is scaled down: its shares stay right to 1 in 10,000.
            if total > 10_000:
                weights = [max(1, weight * 10_000 // total) for weight in weights]
                total = sum(weights)
            current = [0] * len(weights)
            turns = []
            for _ in range(total):
                for i, weight in enumerate(weights):
                    current[i] += weight
                best = max(range(len(current)), key=current.__getitem__)
                current[best] -= total
                turns.append(endpoints[best])
            order = tuple(turns)
        self._schedules[name] = (endpoints, order)
        return order
