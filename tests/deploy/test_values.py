"""Values of an installation: defaults, files, settings, and errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.values import Values, ValuesError, check_namespace, load


def test_defaults() -> None:
    assert load() == Values()


def test_later_files_and_settings_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("image: {tag: '1', repository: r}\nlog: {level: debug}\n")
    (tmp_path / "b.yaml").write_text("image: {tag: '2'}\n")
    values = load([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["log.level=error", "outside=[kube-system, x]"])
    assert (values.image.repository, values.image.tag) == ("r", "2")
    assert values.log.level == "error"
    assert values.outside == ("kube-system", "x")


def test_a_version_is_no_number() -> None:
    assert load(settings=["image.tag=1.0"]).image.tag == "1.0"


def test_null_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("image: {tag: null}\nlog: null\n")
    assert load([tmp_path / "a.yaml"]) == Values()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("agnt.x=1", "unknown field `agnt`"),
        ("controlplane.replicas=0", r"\$.controlplane.replicas"),
        ("controlplane.replicas=two", r"\$.controlplane.replicas"),
        ("cni.binDir=opt", r"\$.cni.binDir"),
        ("webhook.failurePolicy=Maybe", r"\$.webhook.failurePolicy"),
        ("outside=[]", r"\$.outside"),
        ("image.tag", "not NAME=VALUE"),
        ("=1", "not NAME=VALUE"),
        ("image.tag={", "image.tag="),
        ("nodeproxy.graceSeconds=10", "longer than nodeproxy.drainSeconds"),
        ("image=1", r"\$.image"),
    ],
)
def test_refusals_name_the_value(setting: str, message: str) -> None:
    with pytest.raises(ValuesError, match=message):
        load(settings=[setting])


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValuesError, match=r"missing\.yaml"):
        load([tmp_path / "missing.yaml"])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValuesError, match=r"list\.yaml: no mapping"):
        load([tmp_path / "list.yaml"])


@pytest.mark.parametrize("name", ["kube-system", "default", "Mesh", "a" * 64, "-a", ""])
def test_namespaces_that_cannot_be_ours(name: str) -> None:
    with pytest.raises(ValuesError):
        check_namespace(name)
