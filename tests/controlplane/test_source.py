"""The folder of manifests: reading, last good state, and how soon a change is there."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.compiler import compile_snapshot, validate
from controlplane.model.world import Settings
from controlplane.source import Key, State
from controlplane.source.folder import Folder
from controlplane.source.lastgood import LastGood
from controlplane.source.manifests import ManifestError, parse
from tests.controlplane.support import Manifest, istio, mesh_namespace, namespace, pod, service, write

RULE = istio("DestinationRule", "a", {"host": "a"})


def names(state: State) -> list[str]:
    return sorted(str(k) for k in state.objects)


def load(folder: Path) -> State:
    return Folder(folder, validate).load()


def test_reads_all_forms(tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    write(tmp_path, "a.yaml", namespace("one"), "", "# nothing", namespace("two"))
    write(tmp_path / "deep", "b.yml", {"apiVersion": "v1", "kind": "List", "items": [service("s"), pod("p")]})
    (tmp_path / "deep/er/c.json").write_text(
        '{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "three"}}'
    )
    typed = "apiVersion: v1\nkind: NamespaceList\nitems:\n- metadata: {name: four}\n"
    write(tmp_path, "d.yaml", typed)
    (tmp_path / "readme.txt").write_text("not: [a manifest")
    (tmp_path / ".hidden.yaml").write_text("not: [a manifest")
    state = load(tmp_path)
    assert not state.faults
    assert names(state) == [
        "Namespace four",
        "Namespace one",
        "Namespace three",
        "Namespace two",
        "Pod default/p",
        "Service default/s",
    ]


def test_the_api_version_is_no_part_of_the_key(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", RULE)
    write(tmp_path, "b.yaml", {**RULE, "apiVersion": "networking.istio.io/v1alpha3"})
    state = load(tmp_path)
    assert names(state) == ["DestinationRule default/a"]
    assert {f.file for f in state.faults} == {"a.yaml", "b.yaml"}
    assert all(
        "two objects of one name" in f.reason and f.object == "DestinationRule default/a"
        for f in state.faults
    )


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        (Key("security.istio.io", "AuthorizationPolicy", "shop", "a"), "AuthorizationPolicy.security.istio.io shop/a"),
        (Key("policy.linkerd.io", "AuthorizationPolicy", "shop", "a"), "AuthorizationPolicy.policy.linkerd.io shop/a"),
        (Key("gateway.networking.k8s.io", "Gateway", "shop", "a"), "Gateway.gateway.networking.k8s.io shop/a"),
        (Key("networking.istio.io", "VirtualService", "shop", "a"), "VirtualService shop/a"),
        (Key("", "Namespace", "", "shop"), "Namespace shop"),
    ],
)  # fmt: skip
def test_a_kind_of_several_groups_is_named_with_its_group(key: Key, shown: str) -> None:
    assert str(key) == shown


def test_a_namespace_that_is_not_named_is_default(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: x}")
    assert names(load(tmp_path)) == ["ServiceAccount default/x"]


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ("a: [1", "", "line"),
        ("a: 1\na: 2", "", "'a' stands twice"),
        ("- 1", "document 1", "is no object"),
        ("kind: Pod", "document 1", "apiVersion: required"),
        ("apiVersion: v1\nkind: Pod", "document 1", "metadata: required"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {}", "document 1", "metadata.name: required"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: 5}", "document 1", "metadata.name: required"),
        ("\x01", "", "control characters"),
        ("a: &a [*a]", "", "recursive"),
        (
            "apiVersion: v1\nkind: X\nmetadata: {name: x}\nspec: " + "[" * 70 + "]" * 70,
            "document 1",
            "deeper than 64",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, where: str, reason: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    (tmp_path / "good.yaml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: good}")
    state = load(tmp_path)
    assert names(state) == ["Namespace good"]
    (fault,) = state.faults
    assert (fault.file, fault.field) == ("bad.yaml", where)
    assert reason in fault.reason


def test_aliases_cannot_grow_without_end(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    spec = "".join(f"  {line}\n" for line in lines)
    write(tmp_path, "bomb.yaml", f"apiVersion: v1\nkind: Bomb\nmetadata: {{name: x}}\nspec:\n{spec}")
    started = time.monotonic()
    assert "more than" in load(tmp_path).faults[0].reason
    assert time.monotonic() - started < 5


#: Objects that a parser lets through and that are no JSON, or that a validator could stumble over.
POISON: dict[str, Manifest | str] = {
    "a date": "apiVersion: v1\nkind: Pod\nmetadata: {name: p, uid: u}\nspec: {x: !!timestamp 2001-01-01}",
    "bytes": "apiVersion: v1\nkind: Pod\nmetadata: {name: p, uid: u}\nspec: {x: !!binary aGk=}",
    "a set": "apiVersion: v1\nkind: Pod\nmetadata: {name: p, uid: u}\nspec: {x: !!set {a}}",
    "no number": "apiVersion: v1\nkind: Pod\nmetadata: {name: p, uid: u}\nspec: {x: .inf}",
    "a line end in a name": pod("p\n"),
    "a line end in a namespace": pod("p", ns="default\n"),
    "no version": "apiVersion: security.istio.io\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec: {}",
    "no port number": istio(
        "ServiceEntry", "p", {"hosts": ["a.example"], "ports": [{"name": "http"}, {"name": "b"}]}
    )
    | {"apiVersion": "networking.istio.io/v1"},
    **{
        f"the expression {regex[:20]}": istio(
            "VirtualService",
            "p",
            {
                "hosts": ["s"],
                "http": [{"match": [{"uri": {"regex": regex}}], "route": [{"destination": {"host": "s"}}]}],
            },
        )
        for regex in ("a{1,99999999999999999999}", "a{1001}", "(" * 5000 + "a" + ")" * 5000)
    },
}


@pytest.mark.parametrize("what", POISON)
def test_one_bad_object_stops_no_other(tmp_path: Path, what: str) -> None:
    config = tmp_path / "config"
    config.mkdir()
    write(config, "bad.yaml", POISON[what])
    write(config, "good.yaml", service("s"))
    state = Folder(config, validate, LastGood(tmp_path / "last.json")).load()
    assert names(state) == ["Service default/s"]
    assert {f.file for f in state.faults} == {"bad.yaml"}
    compile_snapshot(state.objects, Settings())


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(pod("p", app="\ud800")))
    state = load(tmp_path)
    assert not state.objects
    assert "Unicode" in state.faults[0].reason


def test_a_validator_that_fails_costs_one_object(tmp_path: Path) -> None:
    def broken(manifest: Manifest) -> list[tuple[str, str]]:
        if manifest["metadata"]["name"] == "bad":
            raise ZeroDivisionError("a bug")
        return []

    write(tmp_path, "all.yaml", namespace("bad"), namespace("good"))
    state = Folder(tmp_path, broken).load()
    assert names(state) == ["Namespace good"]
    assert "a bug" in state.faults[0].reason


def test_merged_mappings_are_overridden(tmp_path: Path) -> None:
    text = "apiVersion: v1\nkind: Pod\nmetadata:\n  <<: [{name: a, uid: first}, {uid: second}]\n  name: b\nspec: {}\n"
    write(tmp_path, "a.yaml", text)
    state = load(tmp_path)
    (found,) = state.objects.values()
    assert found.manifest["metadata"] == {"name": "b", "uid": "first"}


def test_merges_of_merges_cannot_grow_without_end() -> None:
    text = "{x: 1}"
    for level in range(40):
        text = f"{{<<: [&a{level} {text}, *a{level}]}}"
    assert [d.error for d in parse(f"a: {text}".encode())] == ["apiVersion: required, but missing"]


def test_a_whole_number_is_an_integer(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", yaml.safe_dump(service("s")).replace("port: 80", "port: 80.0"))
    (tmp_path / "b.json").write_text(json.dumps(service("t")).replace(": 80,", ": 80.0,"))
    state = load(tmp_path)
    ports = [o.spec["ports"][0]["port"] for o in state.objects.values()]
    assert (ports, [type(p) for p in ports]) == ([80, 80], [int, int])


@given(st.binary(max_size=200))
def test_parses_or_says_why(data: bytes) -> None:
    for is_json in (False, True):
        try:
            list(parse(data, is_json))
        except ManifestError:
            pass


class Steps:
    """A folder and its source, driven step by step without a watch: load() reads whatever is there."""

    def __init__(self, root: Path) -> None:
        self.config, self.store = root / "config", LastGood(root / "last-good.json")
        self.config.mkdir()

    def load(self) -> State:
        return Folder(self.config, validate, self.store).load()


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    return Steps(tmp_path)


def spec_of(state: State) -> object:
    (found,) = [o for k, o in state.objects.items() if k.kind == "DestinationRule"]
    return found.spec["host"]


def test_a_file_that_breaks_keeps_what_it_held_over_a_restart(steps: Steps) -> None:
    write(steps.config, "a.yaml", RULE, namespace("one"))
    steps.load()
    write(steps.config, "a.yaml", "}")
    state = steps.load()
    assert names(state) == ["DestinationRule default/a", "Namespace one"]
    assert state.faults[0].file == "a.yaml"
    assert names(steps.load()) == ["DestinationRule default/a", "Namespace one"]


def test_an_object_that_is_refused_keeps_its_last_good_version(steps: Steps) -> None:
    write(steps.config, "a.yaml", istio("DestinationRule", "a", {"host": "one"}))
    steps.load()
    write(
        steps.config, "a.yaml", istio("DestinationRule", "a", {"host": "two", "subset": []}), namespace("new")
    )
    state = steps.load()
    assert spec_of(state) == "one"
    assert "Namespace new" in names(state), "one bad object never stops the rest"
    (fault,) = state.faults
    assert (fault.file, fault.object, fault.field) == ("a.yaml", "DestinationRule default/a", "spec.subset")
    assert "did you mean subsets?" in fault.reason
    write(steps.config, "a.yaml", istio("DestinationRule", "a", {"host": "two"}))
    assert spec_of(steps.load()) == "two"


def test_an_object_that_was_never_good_is_absent(steps: Steps) -> None:
    write(steps.config, "a.yaml", istio("DestinationRule", "a", {"host": 5}))
    state = steps.load()
    assert not state.objects
    assert "is an integer, not a string" in state.faults[0].reason


def test_deleting_is_deleting(steps: Steps) -> None:
    path = write(steps.config, "a.yaml", RULE)
    steps.load()
    path.unlink()
    assert not steps.load().objects
    write(steps.config, "a.yaml", RULE, namespace("one"))
    steps.load()
    write(steps.config, "a.yaml", namespace("one"))
    assert names(steps.load()) == ["Namespace one"]


def test_of_two_with_one_name_the_one_in_force_stays(steps: Steps) -> None:
    write(steps.config, "b.yaml", istio("DestinationRule", "a", {"host": "old"}))
    steps.load()
    write(steps.config, "a.yaml", istio("DestinationRule", "a", {"host": "intruder"}))
    state = steps.load()
    assert spec_of(state) == "old"
    assert "meanwhile the version from b.yaml" in state.faults[0].action
    (steps.config / "b.yaml").unlink()
    assert spec_of(steps.load()) == "intruder"


def test_an_object_may_move_to_another_file(steps: Steps) -> None:
    path = write(steps.config, "a.yaml", RULE)
    steps.load()
    path.rename(steps.config / "z.yaml")
    state = steps.load()
    assert names(state) == ["DestinationRule default/a"]
    assert not state.faults


def test_a_folder_that_is_away_changes_nothing(steps: Steps) -> None:
    write(steps.config, "a.yaml", RULE)
    steps.load()
    steps.config.rename(steps.config.with_name("elsewhere"))
    state = steps.load()
    assert names(state) == ["DestinationRule default/a"]
    assert "cannot be read" in state.faults[0].reason


def test_a_link_that_leads_nowhere_keeps_what_it_led_to(steps: Steps, tmp_path: Path) -> None:
    write(tmp_path, "real.yaml", RULE)
    (steps.config / "a.yaml").symlink_to(tmp_path / "real.yaml")
    first = steps.load()
    (tmp_path / "real.yaml").unlink()
    state = steps.load()
    assert state.objects == first.objects
    assert [f.file for f in state.faults] == ["a.yaml"]
    (steps.config / "a.yaml").unlink()
    state = steps.load()
    assert not state.objects
    assert not state.faults


def test_a_folder_below_that_cannot_be_listed_keeps_what_it_held(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    (steps.config / "below").mkdir()
    write(steps.config / "below", "a.yaml", RULE)
    first = steps.load()
    listed = os.listdir

    def listdir(path: Path) -> list[str]:
        if path.name == "below":  # root reads whatever it likes: an error of the disk is what is left
            raise OSError(errno.EIO, "Input/output error")
        return listed(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", listdir)
        state = steps.load()
    assert state.objects == first.objects
    assert [(f.file, f.reason) for f in state.faults] == [("below", "cannot be read: Input/output error")]
    (steps.config / "below" / "a.yaml").unlink()
    assert not steps.load().objects


def test_a_file_name_that_is_no_text_is_a_fault_like_others(steps: Steps) -> None:
    write(steps.config, "good.yaml", RULE)
    (steps.config / os.fsdecode(b"b\xff.yaml")).write_text("{}")
    state = steps.load()
    assert len(state.objects) == 1
    assert [(f.file, f.reason) for f in state.faults] == [
        ("b\\xff.yaml", "cannot be read: its name is no UTF-8 text")
    ]


@pytest.mark.parametrize(
    "entry",
    ["[]", "5", '{"manifest": {"apiVersion": 1}, "file": ""}', '{"manifest": [], "file": ""}', "[" * 9999],
)
def test_a_store_of_something_else_is_no_obstacle(steps: Steps, tmp_path: Path, entry: str) -> None:
    (tmp_path / "last-good.json").write_text(f'{{"format": 1, "objects": [{entry}]}}')
    assert steps.load() == State()


def test_a_broken_store_is_no_obstacle(steps: Steps, tmp_path: Path) -> None:
    write(steps.config, "a.yaml", RULE)
    (tmp_path / "last-good.json").write_text('{"format": 1, "objects": [{}]}')
    assert names(steps.load()) == ["DestinationRule default/a"]


@settings(max_examples=30, deadline=None)
@given(st.permutations([f"{n}.yaml" for n in range(5)]))
def test_the_order_of_arrival_means_nothing(order: list[str]) -> None:
    manifests: dict[str, Manifest | str] = {
        "0.yaml": RULE,
        "1.yaml": istio("DestinationRule", "a", {"host": "twin"}),
        "2.yaml": "}",
        "3.yaml": namespace("n"),
        "4.yaml": istio("DestinationRule", "b", {"hst": "b"}),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in order:
            write(Path(folder), name, manifests[name])
        state = load(Path(folder))
    assert spec_of(state) == "a"
    assert len(state.faults) == 5, "two twins, one file, one unknown and one missing field"


@asynccontextmanager
async def watched(folder: Path) -> AsyncIterator[tuple[State, asyncio.Queue[State]]]:
    """A source that is followed: the state at the start, and a queue of those that come."""
    source = Folder(folder, validate)
    first = source.load()
    queue: asyncio.Queue[State] = asyncio.Queue()

    async def follow() -> None:
        async for state in source.changes():
            queue.put_nowait(state)

    task = asyncio.get_running_loop().create_task(follow())
    await asyncio.sleep(0.05)
    try:
        yield first, queue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(queue: asyncio.Queue[State], *expected: str, timeout: float = 5.0) -> State:
    async with asyncio.timeout(timeout):
        while True:
            state = await queue.get()
            if names(state) == sorted(expected):
                return state


async def test_changes_arrive(tmp_path: Path) -> None:
    async with watched(tmp_path) as (_, queue):
        write(tmp_path, "a.yaml", namespace("one"))
        await until(queue, "Namespace one")
        (tmp_path / "b.yaml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: two}")
        await until(queue, "Namespace one", "Namespace two")
        (tmp_path / "sub/sub").mkdir(parents=True)
        write(tmp_path / "sub/sub", "c.yaml", namespace("three"))
        await until(queue, "Namespace one", "Namespace two", "Namespace three")
        (tmp_path / "sub").rename(tmp_path / "moved")
        write(tmp_path / "moved/sub", "c.yaml", namespace("four"))
        await until(queue, "Namespace one", "Namespace two", "Namespace four")
        (tmp_path / "a.yaml").unlink()
        await until(queue, "Namespace two", "Namespace four")


async def test_the_folder_itself_may_go_and_come_back(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.mkdir()
    write(config, "a.yaml", namespace("one"))
    async with watched(config) as (_, queue):
        config.rename(tmp_path / "away")
        state = await asyncio.wait_for(queue.get(), 5)
        assert names(state) == ["Namespace one"]
        assert "the folder cannot be read" in state.faults[0].reason
        config.mkdir()
        write(config, "b.yaml", namespace("two"))
        state = await until(queue, "Namespace two")
        assert not state.faults
        write(config, "c.yaml", namespace("three"))
        await until(queue, "Namespace three", "Namespace two")


async def test_a_swapped_link_is_seen(tmp_path: Path) -> None:
    """How a kubelet updates a mounted ConfigMap: files are links through ``..data``, which is replaced by a rename."""
    for version, name in (("..v1", "one"), ("..v2", "two")):
        (tmp_path / version).mkdir()
        write(tmp_path / version, "a.yaml", namespace(name))
    (tmp_path / "..data").symlink_to("..v1")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    async with watched(tmp_path) as (first, queue):
        assert names(first) == ["Namespace one"]
        (tmp_path / "..data_tmp").symlink_to("..v2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        await until(queue, "Namespace two")


async def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", namespace("one"), namespace("two"))
    async with watched(tmp_path) as (_, queue):
        with (tmp_path / "a.yaml").open("w") as f:
            f.write("apiVersion: v1\nkind: Namespace\nmetadata: {name: one}\n")
            f.flush()
            # Another file changes meanwhile, so the folder is looked at.
            write(tmp_path, "b.yaml", namespace("three"))
            state = await asyncio.wait_for(queue.get(), 5)
            assert names(state) == ["Namespace one", "Namespace three", "Namespace two"]
            await asyncio.sleep(0.3)
            assert queue.empty()
            f.write("---\napiVersion: v1\nkind: Namespace\nmetadata: {name: four}\n")
        await until(queue, "Namespace one", "Namespace four", "Namespace three")


async def test_never_half_a_file(tmp_path: Path) -> None:
    """A writer rewrites two objects in place, slowly, again and again: both are always there."""
    text = [
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: one}\n",
        "---\n",
        "apiVersion: v1\nkind: Namespace\n",
    ]
    text += ["metadata: {name: two, labels: {n: '%d'}}\n"]
    async with watched(tmp_path) as (_, queue):
        for n in range(20):
            with (tmp_path / "a.yaml").open("w") as f:
                for part in text:
                    f.write(part % n if "%d" in part else part)
                    f.flush()
                    await asyncio.sleep(random.Random(n).random() / 100)
        await asyncio.sleep(0.3)
        seen = []
        while not queue.empty():
            seen.append(names(queue.get_nowait()))
        assert seen
        assert all(n == ["Namespace one", "Namespace two"] for n in seen), seen


async def test_a_storm_ends_in_the_right_state(tmp_path: Path) -> None:
    rng = random.Random(7)
    async with watched(tmp_path) as (_, queue):
        for n in range(300):
            path = tmp_path / f"{rng.randrange(20)}.yaml"
            if rng.random() < 0.3:
                path.unlink(missing_ok=True)
            else:
                write(tmp_path, path.name, namespace(f"n{path.stem}-{n}"))
            if rng.random() < 0.1:
                await asyncio.sleep(0.01)
        expected = names(load(tmp_path))
        await until(queue, *expected)


async def test_a_change_is_there_in_milliseconds(tmp_path: Path) -> None:
    """With 500 pods beside it. The bar for the whole way to kernel and proxies is a second at p99; this is its first part."""
    for n in range(500):
        write(tmp_path, f"pod-{n}.yaml", pod(f"p{n}", f"10.1.{n // 250}.{n % 250 + 1}", uid=f"u{n}"))
    write(tmp_path, "ns.yaml", mesh_namespace())
    times = []
    async with watched(tmp_path) as (_, queue):
        for n in itertools.count():
            if n == 20:
                break
            started = time.monotonic()
            write(tmp_path, "x.yaml", istio("DestinationRule", "a", {"host": f"h{n}"}))
            await asyncio.wait_for(queue.get(), 5)
            times.append(time.monotonic() - started)
    assert statistics.median(times) < 0.2, times


def test_stores_nothing_that_others_can_read(steps: Steps, tmp_path: Path) -> None:
    write(steps.config, "a.yaml", RULE)
    steps.load()
    assert os.stat(tmp_path / "last-good.json").st_mode & 0o077 == 0
