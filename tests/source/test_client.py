"""The client of the Kubernetes API: against a real server what servers do, and a scripted one what they seldom do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from common.kubernetes import Access, AccessError, ApiError, Client, Unreachable, path_of
from lab.kubernetes import ControlPlane
from tests.source.conftest import busy, scripted

CONFIG_MAPS = path_of("v1", "configmaps", "default")


@pytest.mark.privileged
async def test_pages_watch_and_writes(client: Client) -> None:
    for i in range(5):
        await client.create(CONFIG_MAPS, {"metadata": {"name": f"page-{i}", "labels": {"test": "pages"}}})
    sizes = [len(i) async for i, _ in client.pages(CONFIG_MAPS, labelSelector="test=pages", limit=2)]
    assert sizes == [2, 2, 1]
    found = await client.list(CONFIG_MAPS, labelSelector="test=pages", limit=2)
    assert [i["metadata"]["name"] for i in found["items"]] == [f"page-{i}" for i in range(5)]
    opened = asyncio.Event()
    events: list[tuple[str, str]] = []

    async def watch() -> None:
        version = found["metadata"]["resourceVersion"]
        watched = client.watch(CONFIG_MAPS, opened=opened.set, resourceVersion=version, timeoutSeconds=30)
        async with contextlib.aclosing(watched) as stream:
            async for event in stream:
                events.append((event["type"], event["object"]["metadata"].get("name", "")))
                if event["type"] == "DELETED":
                    return

    watching = asyncio.create_task(watch())
    await asyncio.wait_for(opened.wait(), 20)
    path = f"{CONFIG_MAPS}/page-0"
    applied = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "page-0"}, "data": {"a": "1"}}
    await client.apply(path, applied, "one")
    with pytest.raises(ApiError) as conflict:
        await client.apply(path, applied | {"data": {"a": "2"}}, "two")
    assert (conflict.value.status, conflict.value.reason) == (409, "Conflict")
    assert (await client.apply(path, applied | {"data": {"a": "2"}}, "two", force=True))["data"] == {"a": "2"}
    old = await client.get(path)
    await client.patch(path, {"data": {"b": "3"}})
    with pytest.raises(ApiError, match="409 Conflict"):
        await client.replace(path, old)
    await client.delete(path)
    with pytest.raises(ApiError) as gone:
        await client.get(path)
    assert (gone.value.status, gone.value.reason) == (404, "NotFound")
    await asyncio.wait_for(watching, 20)
    assert [e for e in events if e[0] != "BOOKMARK"] == [("MODIFIED", "page-0")] * 3 + [("DELETED", "page-0")]
    await client.delete(CONFIG_MAPS, labelSelector="test=pages")
    assert await client.get_text("/readyz") == "ok"


@pytest.mark.privileged
async def test_token_file_is_read_again(client: Client, server: ControlPlane, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("none yet\n")
    access = Access(server.url, ca=server.certificate_authority, token_file=file)
    async with Client(access) as other:
        with pytest.raises(ApiError, match="401"):
            await other.get("/api/v1/namespaces/default")
        file.write_text(await token(client))
        with pytest.raises(ApiError, match="403"):
            await other.get("/api/v1/namespaces/default")


async def token(client: Client) -> str:
    accounts = path_of("v1", "serviceaccounts", "default")
    with contextlib.suppress(ApiError):
        await client.create(accounts, {"metadata": {"name": "nobody"}})
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    made = await client.create(f"{accounts}/nobody/token", body)
    return str(made["status"]["token"])


def plugin(folder: Path, script: str) -> Path:
    path = folder / "plugin"
    path.write_text(f"#!/bin/sh\necho run >>{folder}/runs\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def kubeconfig(folder: Path, server: str, ca: Path | None, user: dict[str, Any]) -> Path:
    cluster = {"server": server} | ({"certificate-authority": str(ca)} if ca else {})
    text = yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "here"}}],
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": user}],
        }
    )
    path = folder / "kubeconfig"
    path.write_text(text)
    return path


@pytest.mark.privileged
async def test_exec_plugin(client: Client, server: ControlPlane, tmp_path: Path) -> None:
    """Asked once, again when its credential is over or was refused; it is told which cluster is meant."""
    (tmp_path / "token").write_text("refused")
    answer = (
        '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"%s"}}'
    )
    script = (
        f'echo "$KUBERNETES_EXEC_INFO" >{tmp_path}/info; printf \'{answer}\' "$(cat {tmp_path}/token)$SUFFIX"'
    )
    command = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": str(plugin(tmp_path, script)),
        "provideClusterInfo": True,
        "interactiveMode": "Never",
        "env": [{"name": "SUFFIX", "value": ""}],
    }
    file = kubeconfig(tmp_path, server.url, server.certificate_authority, {"exec": command})
    access = Access.load(file)
    assert access.namespace == "here"
    async with Client(access) as other:
        with pytest.raises(ApiError, match="401"):
            await other.get("/api/v1/namespaces/default")
        assert (tmp_path / "runs").read_text().count("run") == 2
        (tmp_path / "token").write_text(await token(client))
        for _ in range(3):
            with pytest.raises(ApiError, match="403"):
                await other.get("/api/v1/namespaces/default")
        assert (tmp_path / "runs").read_text().count("run") == 3
    info = json.loads((tmp_path / "info").read_text())
    assert info["spec"]["cluster"]["server"] == server.url and info["spec"]["interactive"] is False


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo no such profile >&2; exit 3", "exit status 3: no such profile"),
        ("echo '{}'", "no ExecCredential"),
        (
            'echo \'{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{}}\'',
            "neither",
        ),
    ],
)
async def test_exec_plugin_that_fails(tmp_path: Path, script: str, says: str) -> None:
    command = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin(tmp_path, script))}
    file = kubeconfig(tmp_path, "https://127.0.0.1:1", None, {"exec": command})
    async with Client(Access.load(file)) as client:
        with pytest.raises(Unreachable, match=says):
            await client.get("/version")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("current-context"), "current-context is not set"),
        (lambda c: c.update(contexts=[]), "contexts has no 'c'"),
        (lambda c: c["clusters"][0].update(name="d"), "clusters has no 'c'"),
        (lambda c: c["clusters"][0]["cluster"].update(server="ftp://x"), "server is no URL"),
        (lambda c: c["users"][0]["user"].update({"auth-provider": {}}), "auth-provider was removed"),
        (lambda c: c["users"][0]["user"].update({"client-key": "x"}), "go together"),
        (
            lambda c: c["users"][0]["user"].update({"client-key-data": "%%", "client-certificate": "x"}),
            "client-key-data is not base64",
        ),
        (lambda c: c["users"][0]["user"].update(exec={"command": "x"}), "exec wants"),
        (lambda c: c.update(users=5), "cannot be read"),
    ],
)
def test_kubeconfig_that_is_wrong(tmp_path: Path, change: Callable[[Any], object], says: str) -> None:
    file = kubeconfig(tmp_path, "https://127.0.0.1:1", None, {"token": "x"})
    config = yaml.safe_load(file.read_text())
    change(config)
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(AccessError, match=says):
        Access.load(file)
    with pytest.raises(AccessError, match="does not exist"):
        Access.load(tmp_path / "none")


def test_kubeconfigs_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first file that names something wins; a relative path is relative to its own file."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    kubeconfig(tmp_path / "a", "https://one:1", Path("ca.crt"), {"token": "x"})
    kubeconfig(tmp_path / "b", "https://two:2", None, {"token": "y"})
    files = [tmp_path / "none", tmp_path / "a/kubeconfig", tmp_path / "b/kubeconfig"]
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, files)))
    access = Access.load()
    assert (access.server, access.token, access.ca) == ("https://one:1", "x", tmp_path / "a/ca.crt")


def fine(_: web.Request) -> web.Response:
    return web.json_response({"fine": True})


def broken(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


RETRY = {"Retry-After": "0"}


async def test_what_is_repeated() -> None:
    async with (
        scripted(busy(429, **RETRY), busy(503, **RETRY), fine) as (access, asked),
        Client(access) as client,
    ):
        assert await client.create("/x", {}) == {"fine": True}
        assert len(asked) == 3
    async with scripted(busy(429, **RETRY)) as (access, asked), Client(access) as client:
        with pytest.raises(ApiError, match="429 Busy"):
            await client.get("/x")
        assert len(asked) == 5
    for status in (500, 503, 504):
        async with scripted(busy(status)) as (access, asked), Client(access) as client:
            with pytest.raises(ApiError) as refused:
                await client.get("/x")
            assert (refused.value.status, len(asked)) == (status, 1)
    async with scripted(broken, fine) as (access, asked), Client(access) as client:
        assert await client.get("/x") == {"fine": True}
    async with scripted(broken, fine) as (access, asked), Client(access) as client:
        with pytest.raises(Unreachable):
            await client.create("/x", {})
        assert asked == ["POST"], "it may have been carried out"


async def test_lists_hold_up_nobody() -> None:
    """A server that is slow with lists still renews Leases and reviews tokens."""

    async def answer(request: web.Request) -> web.Response:
        if "limit" in request.query:
            await asyncio.sleep(60)
        return fine(request)

    async with scripted(answer) as (access, asked), Client(access) as client:
        lists = [asyncio.create_task(client.list(f"/{i}")) for i in range(20)]
        async with asyncio.timeout(20):
            while len(asked) < 8:  # noqa: ASYNC110  (nobody tells)
                await asyncio.sleep(0.01)
            assert await client.create("/x", {}) == {"fine": True}
        for task in lists:
            task.cancel()
        await asyncio.gather(*lists, return_exceptions=True)


async def test_a_page_that_is_too_old() -> None:
    """Listing took longer than the server keeps that state: all is read again, at once."""

    def page(request: web.Request) -> web.Response:
        token = request.query.get("continue")
        if token:
            assert "resourceVersion" not in request.query
            return web.json_response({"kind": "Status", "reason": "Expired"}, status=410)
        names = ["a", "b"] if "limit" in request.query else ["a", "b", "c"]
        metadata = {"resourceVersion": str(len(names)), "continue": "more" if len(names) == 2 else ""}
        return web.json_response({"metadata": metadata, "items": [{"metadata": {"name": n}} for n in names]})

    async with scripted(page) as (access, asked), Client(access) as client:
        found = await client.list("/x", resourceVersion="0")
    assert [i["metadata"]["name"] for i in found["items"]] == ["a", "b", "c"]
    assert found["metadata"]["resourceVersion"] == "3"
    assert len(asked) == 3


async def test_what_is_no_answer() -> None:
    async def silent(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    async def cut_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'{"type":"ADDED","object":{"metadata":{"name":"a"}}}\n{"type":')
        assert request.transport is not None
        await asyncio.sleep(0.1)
        request.transport.abort()
        return response

    async with scripted(silent) as (access, _), Client(access, timeout=0.3) as client:
        began = time.monotonic()
        with pytest.raises(Unreachable):
            await client.get("/x")
        assert time.monotonic() - began < 5
    async with scripted(lambda _: web.Response(text="<html>")) as (access, _), Client(access) as client:
        with pytest.raises(Unreachable, match="no JSON"):
            await client.get("/x")
    async with scripted(cut_off) as (access, _), Client(access) as client:
        events = client.watch("/x")
        assert (await anext(events))["object"]["metadata"]["name"] == "a"
        with pytest.raises(Unreachable):
            await anext(events)
    error = {
        "type": "ERROR",
        "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "old"},
    }
    async with (
        scripted(lambda _: web.Response(text=json.dumps(error) + "\n")) as (access, _),
        Client(access) as client,
    ):
        with pytest.raises(ApiError) as expired:
            _ = [e async for e in client.watch("/x")]
        assert expired.value.expired
    async with Client(Access("https://127.0.0.1:1")) as client:
        with pytest.raises(Unreachable, match=r"127.0.0.1:1: .*refused|Connect call failed"):
            await client.get("/x")


@pytest.mark.privileged
async def test_a_server_with_another_certificate(server: ControlPlane) -> None:
    async with Client(Access(server.url)) as client:
        with pytest.raises(Unreachable, match="certificate verify failed"):
            await client.get("/version")
