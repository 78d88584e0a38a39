"""The last resort for what the compiler cannot take though every check has let it through: a bug of ours.

Finds which objects it is, so that they alone keep their last good version and all others get theirs, also at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from controlplane.source import Fault, Key, Object

#: Compiles objects; raises whatever it raises if it cannot.
Attempt = Callable[[Mapping[Key, Object]], object]


def settle(
    good: Mapping[Key, Object], wanted: Mapping[Key, Object], attempt: Attempt
) -> tuple[dict[Key, Object], list[Fault]]:
    """As much of ``wanted`` as compiles, and a fault for each object that does not.

    ``good`` compiles; of an object that does not, its version from there stays. Takes a number of attempts that grows with
    the logarithm of what has changed, for each such object.
    """
    changed = sorted(key for key in good.keys() | wanted.keys() if good.get(key) != wanted.get(key))
    faults: list[Fault] = []
    return _settle(dict(good), wanted, changed, attempt, faults), faults


def _settle(
    good: dict[Key, Object],
    wanted: Mapping[Key, Object],
    changed: list[Key],
    attempt: Attempt,
    faults: list[Fault],
) -> dict[Key, Object]:
    if not changed:
        return good
    candidate = dict(good)
    for key in changed:
        if key in wanted:
            candidate[key] = wanted[key]
        else:
            candidate.pop(key, None)
    try:
        attempt(candidate)
    except Exception as e:
        if len(changed) == 1:
            about = wanted.get(changed[0]) or good[changed[0]]
            reason = f"the controller cannot compile it, which is its bug: {type(e).__name__}: {e}"
            faults.append(
                Fault(about.file, str(about.key), "", reason, "its last good version stays", about.key)
            )
            return good
        half = len(changed) // 2
        good = _settle(good, wanted, changed[:half], attempt, faults)
        return _settle(good, wanted, changed[half:], attempt, faults)
    return candidate
