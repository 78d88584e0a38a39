"""The SPIFFE ID tables of go-spiffe, all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import spiffe

Case = dict[str, Any]


def _id(case: Case) -> Case:
    parsed = spiffe.parse(case["input"])
    return {"trustDomain": parsed.trust_domain, "path": parsed.path}


def _changed(case: Case, change: str) -> Case:
    base = spiffe.SpiffeId("trustdomain").replace_path(case["path"])
    return {"path": getattr(base, change)(case["with"]).path}


def _match(case: Case) -> None:
    matcher, peer = case["matcher"], spiffe.parse(case["peer"]) if case["peer"] else None
    if "any" in matcher:
        match = spiffe.match_any()
    elif "id" in matcher:
        match = spiffe.match_id(spiffe.parse(matcher["id"]))
    elif "oneOf" in matcher:
        match = spiffe.match_one_of([spiffe.parse(i) for i in matcher["oneOf"]])
    else:
        match = spiffe.match_member_of(matcher["memberOf"])
    match(peer)


RUN: dict[str, Callable[[Case], Any]] = {
    "id": _id,
    "trustDomain": lambda c: {"trustDomain": spiffe.trust_domain(c["input"])},
    "segments": lambda c: {"path": spiffe.join_segments(c["segments"])},
    "replacePath": lambda c: _changed(c, "replace_path"),
    "appendPath": lambda c: _changed(c, "append_path"),
    "replaceSegments": lambda c: _changed(c, "replace_segments"),
    "appendSegments": lambda c: _changed(c, "append_segments"),
    "match": _match,
}


def test_all_cases(shared: Path, conformance_count: Callable[..., None]) -> None:
    cases = json.loads((shared / "conformance/spiffe/ids.json").read_text())
    wrong = []
    for case in cases:
        try:
            result, error = RUN[case["op"]](case), None
        except spiffe.SpiffeError as e:
            result, error = None, str(e)
        if error != case.get("error") or result != case.get("expect"):
            wrong.append((case, result, error))
    conformance_count("spiffe", len(cases) - len(wrong), len(cases))
    assert len(cases) == 908
    assert not wrong


def test_workload_ids_go_both_ways() -> None:
    identity = spiffe.workload_id("cluster.local", "shop", "web")
    assert str(identity) == "spiffe://cluster.local/ns/shop/sa/web"
    assert identity.principal == "cluster.local/ns/shop/sa/web"
    assert identity.workload() == ("shop", "web")
    assert spiffe.parse("spiffe://cluster.local/ns/shop/sa/web/x").workload() is None
    with pytest.raises(spiffe.SpiffeError):
        spiffe.workload_id("cluster.local", "shop/sa", "web")


def test_limits_of_length() -> None:
    with pytest.raises(spiffe.SpiffeError, match="2048"):
        spiffe.parse("spiffe://td/" + "a" * 2048)
    with pytest.raises(spiffe.SpiffeError, match="255"):
        spiffe.trust_domain("a" * 256)


@given(st.text())
def test_parses_or_says_why(text: str) -> None:
    try:
        assert str(spiffe.parse("spiffe://" + text)) == "spiffe://" + text
    except spiffe.SpiffeError:
        pass
