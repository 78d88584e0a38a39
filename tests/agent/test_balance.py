"""Weights as slots, and check words: what the kernel draws by is what was asked for."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from agent.kernel.services import alias_table
from bpf import checks, wire
from bpf.wire import SHARE_WHOLE


def drawn(table: list[tuple[int, int]]) -> list[Fraction]:
    """The chance of each slot's backend, as ``draw()`` in bpf/lib/balance.h has it."""
    chances = [Fraction(0)] * len(table)
    for slot, (share, other) in enumerate(table):
        own = Fraction(1) if share == SHARE_WHOLE else Fraction(share, 1 << 32)
        chances[slot] += own / len(table)
        chances[other] += (1 - own) / len(table)
    return chances


@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=60))
def test_every_backend_gets_its_weight(weights):
    total = sum(weights)
    for chance, weight in zip(drawn(alias_table(weights)), weights, strict=True):
        # Each share is rounded once to 32 bits, and a backend may stand in every slot.
        assert abs(chance - Fraction(weight, total)) <= Fraction(1, 1 << 32)


def test_extremes():
    assert drawn(alias_table([1])) == [1]
    assert drawn(alias_table([7, 7, 7])) == [Fraction(1, 3)] * 3
    table = alias_table([0xFFFFFFFF, *[1] * 9999])
    assert drawn(table)[0] > Fraction(999_997, 1_000_000)
    assert min(drawn(table)) > 0


def test_check_words_tell_neighbours_apart():
    """Services and backends are of one network each, and of one port: what differs is a few bits of the address."""
    seeds = [checks.seed_of(wire.Endpoint(f"10.96.0.{service}", 80)) for service in range(64)]
    words = {checks.of_backend(seed, f"10.244.0.{host}", 8080, 6) for seed in seeds for host in range(64)}
    assert len(words) == 64 * 64
