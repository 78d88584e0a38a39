from collections.abc import Iterator

import pytest

from tests.nodeproxy.fakes.world import World


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()
