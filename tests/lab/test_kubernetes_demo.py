"""The story of ``make demo-kubernetes`` ends with a status that says whether all was true. (On a cluster: tests/cluster.)"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lab.demo import Untrue
from lab.errors import LabError
from lab.kubernetes.demo import Demo, tell

CHAPTERS = ("install", "enrol", "canary", "encrypted", "strict", "denied", "check", "figures")


class Cast(Demo):
    """The chapters without a cluster: each is true but for one.

    :param failing: the chapter that raises ``error``.
    """

    def __init__(self, failing: str = "", error: Exception | None = None) -> None:
        self.told: list[str] = []
        for name in CHAPTERS:
            setattr(self, name, self._chapter(name, error if name == failing else None))

    def _chapter(self, name: str, error: Exception | None) -> Callable[[], str]:
        def chapter() -> str:
            self.told.append(name)
            if error:
                raise error
            return f"seen: {name}"

        return chapter


def test_all_claims_hold(capsys: pytest.CaptureFixture[str]) -> None:
    cast = Cast()
    assert tell(cast) == 0
    assert sorted(cast.told) == sorted(CHAPTERS), "a chapter is not told, or is not tested here"
    assert f"{len(CHAPTERS)} of {len(CHAPTERS)} claims held" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [Untrue("seen otherwise"), LabError("kubectl: no")], ids=["untrue", "broken"]
)
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_one_claim_that_does_not_hold_is_seen_in_the_status(
    chapter: str, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    cast = Cast(chapter, error)
    assert tell(cast) != 0
    assert cast.told[-1] == "figures", "the others are told all the same"
    written = capsys.readouterr().out
    assert f"{len(CHAPTERS) - 1} of {len(CHAPTERS)} claims held" in written
    assert written.count("FAILED") == 2 and str(error) in written
