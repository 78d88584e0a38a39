"""Numbers of zones; those of identities are tested with the compiler that gives them."""

import json

import pytest

from agent.identities import Identities, IdentitiesError


def test_a_zone_keeps_its_number_over_restarts():
    numbers = Identities()
    assert [numbers.zone(name) for name in ("eu-1a", "eu-1b", "eu-1a", "")] == [1, 2, 1, 0]
    assert numbers.dirty
    again = Identities.load(numbers.dump())
    assert [again.zone(name) for name in ("eu-1b", "eu-1c")] == [2, 3]
    assert [again.zone_name(n) for n in (0, 1, 2, 3, 4)] == ["unknown", "eu-1a", "eu-1b", "eu-1c", "unknown"]


def test_a_file_from_before_there_were_zones():
    assert Identities.load(b'{"next": 16, "numbers": []}').zone("eu-1a") == 1


def test_zones_out_of_place():
    for zones in ([[1, "a"], [1, "b"]], [[1, "a"], [2, "a"]], [[3, "a"]], [[0, "a"]]):
        data = json.dumps({"next": 16, "numbers": [], "next_zone": 3, "zones": zones}).encode()
        with pytest.raises(IdentitiesError, match="zone number"):
            Identities.load(data)


def test_numbers_that_were_lost_are_not_used_again():
    assert Identities(first=1_790_000_000).zone("eu-1a") == 1 + 1_790_000_000 % 2**15


def test_there_are_65535_zones():
    numbers = Identities()
    given = [numbers.zone(f"z{i}") for i in range(70_000)]
    assert max(given) == 65_535
    assert given[65_535:] == [0] * (70_000 - 65_535)
