"""Whether an end is for good, asked of a real API server: only a removal is one."""

from __future__ import annotations

import base64
import dataclasses
import json
import time

import pytest

from agent.leaving import for_good
from common.kubernetes import Access

pytestmark = pytest.mark.privileged

DAEMON_SET = """
apiVersion: apps/v1
kind: DaemonSet
metadata: {{name: agent, namespace: {namespace}, finalizers: {finalizers}}}
spec:
  selector: {{matchLabels: {{app: agent}}}}
  template:
    metadata: {{labels: {{app: agent}}}}
    spec: {{containers: [{{name: agent, image: agent}}]}}
"""


@pytest.fixture
def access(api_server):
    return Access.load(api_server.kubeconfig)


def make(api_server, namespace, finalizers="[]"):
    manifest = DAEMON_SET.format(namespace=namespace, finalizers=finalizers)
    api_server.kubectl("apply", "-f", "-", input=manifest)
    return f"{namespace}/agent"


async def test_there_is_one(api_server, api_namespace, access):
    assert not await for_good(make(api_server, api_namespace), access)


async def test_gone(api_server, api_namespace, access):
    name = make(api_server, api_namespace)
    api_server.kubectl("delete", "daemonset", "agent", "-n", api_namespace)
    assert await for_good(name, access)


async def test_going(api_server, api_namespace, access):
    """As `kubectl delete --cascade=foreground` has it while its pods end."""
    name = make(api_server, api_namespace, '["example.com/wait"]')
    api_server.kubectl("delete", "daemonset", "agent", "-n", api_namespace, "--wait=false")
    assert await for_good(name, access)
    api_server.kubectl(
        *("patch", "daemonset", "agent", "-n", api_namespace, "--type=json"),
        *("-p", '[{"op": "remove", "path": "/metadata/finalizers"}]'),
    )


def _by_token(access: Access, token: str) -> Access:
    return dataclasses.replace(access, certificate=None, token=token, token_file=None, exec=None)


async def test_no_right_to_ask_is_no_answer(api_server, api_namespace, access):
    name = make(api_server, api_namespace)
    token = api_server.kubectl("create", "token", "default", "-n", api_namespace).strip()
    assert not await for_good(name, _by_token(access, token), patience=1.0)


async def test_service_account_gone(api_server, api_namespace, access):
    name = make(api_server, api_namespace)
    token = api_server.kubectl("create", "token", "default", "-n", api_namespace).strip()
    api_server.kubectl("delete", "serviceaccount", "default", "-n", api_namespace)
    assert await for_good(name, _by_token(access, token), patience=30.0)


async def test_all_goes_at_once(api_server, api_namespace, access):
    """First the right to ask, then the account, while the API server still goes by what it knew of the token."""
    name = make(api_server, api_namespace)
    rights = ("-n", api_namespace, "--role=reader", f"--serviceaccount={api_namespace}:default")
    api_server.kubectl(
        *("create", "role", "reader", "-n", api_namespace),
        *("--verb=get", "--resource=daemonsets.apps"),
    )
    api_server.kubectl("create", "rolebinding", "reader", *rights)
    token = api_server.kubectl("create", "token", "default", "-n", api_namespace).strip()
    assert not await for_good(name, _by_token(access, token))
    for kind, what in (("daemonset", "agent"), ("rolebinding", "reader"), ("serviceaccount", "default")):
        api_server.kubectl("delete", kind, what, "-n", api_namespace)
    assert await for_good(name, _by_token(access, token))


async def test_a_token_that_ran_out_is_no_answer(api_server, api_namespace, access):
    """It is refused as that of an account that is gone; the DaemonSet is there all the same."""
    name = make(api_server, api_namespace)
    header, _, signature = api_server.kubectl("create", "token", "default", "-n", api_namespace).split(".")
    claims = base64.urlsafe_b64encode(json.dumps({"exp": int(time.time()) - 60}).encode()).decode()
    token = f"{header}.{claims.rstrip('=')}.{signature.strip()}"
    assert not await for_good(name, _by_token(access, token), patience=4.0)


async def test_nobody_answers(access):
    away = dataclasses.replace(access, server="https://127.0.0.1:9")
    assert not await for_good("a/b", away, patience=1.0)


async def test_no_credentials_at_all(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert not await for_good("a/b", patience=1.0)
