"""On a real cluster: who gets which certificate by which token, and what is said of policy objects."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from controlplane import api
from lab.errors import LabError
from lab.kubernetes import Kubernetes, programs
from lab.kubernetes.mesh import Mesh
from tests.cluster.apps import Apps

_TOKEN = "/var/run/secrets/mycel.io/token"
POLICIES = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: nobody, namespace: {namespace}}}
spec:
  action: DENY
  rules: [{{from: [{{source: {{namespaces: [nowhere]}}}}]}}]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: default, namespace: {namespace}}}
spec: {{mtls: {{mode: STRICT}}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: web, namespace: {namespace}}}
spec:
  hosts: [web]
  http: [{{route: [{{destination: {{host: web}}}}]}}]
"""
BROKEN = """\
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: web, namespace: {namespace}}}
spec:
  hosts: [web]
  http: [{{route: [{{destination: {{host: web, subset: v9}}}}]}}]
"""


@contextlib.contextmanager
def controller(mesh: Mesh, pod: str) -> Iterator[grpc.Channel]:
    """A channel to one controller, as its clients have it: verified by the public roots and the Service's name."""
    cluster = mesh.cluster
    bundle = cluster.get("configmap", "mycel-roots", "-n", mesh.namespace)["data"]["roots.pem"]
    command = [str(programs.folder() / "kubectl"), f"--kubeconfig={cluster.kubeconfig}", "port-forward"]
    command += ["-n", mesh.namespace, f"pod/{pod}", ":15012"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forwarding:
        try:
            assert forwarding.stdout is not None
            found = re.search(r"127\.0\.0\.1:(\d+)", forwarding.stdout.readline())
            assert found, "kubectl forwards no port"
            name = f"mycel-controlplane.{mesh.namespace}.svc"
            with grpc.secure_channel(
                f"127.0.0.1:{found[1]}",
                grpc.ssl_channel_credentials(bundle.encode()),
                [("grpc.ssl_target_name_override", name)],
            ) as channel:
                yield channel
        finally:
            forwarding.kill()


def sign(channel: grpc.Channel, token: str, uid: str) -> api.SignResponse:
    """Ask for a pod's certificate as whoever has that token.

    :raises grpc.RpcError: refused.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256())
    message = api.encode(api.SignRequest(uid, request.public_bytes(serialization.Encoding.DER)))
    call: Any = channel.unary_unary(api.METHOD_SIGN)
    data = call(message, metadata=(("authorization", f"Bearer {token}"),), timeout=20)
    return api.decode_sign_response(data)


def refused(channel: grpc.Channel, token: str, uid: str) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as e:
        sign(channel, token, uid)
    code: grpc.StatusCode = e.value.code()
    return code


def metric(mesh: Mesh, pod: str, name: str) -> float:
    path = f"/api/v1/namespaces/{mesh.namespace}/pods/{pod}:15014/proxy/metrics"
    lines = mesh.cluster.kubectl("get", "--raw", path).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_a_node_gets_certificates_of_its_own_pods_alone(mesh: Mesh, apps: Apps) -> None:
    cluster, namespace = mesh.cluster, mesh.namespace
    one, two = sorted(cluster.ready_nodes())[:2]
    cluster.kubectl("label", "namespace", apps.namespace, "mycel.io/mesh=enabled")
    here, there = (apps.client(f"client-{node}", node=node) for node in (one, two))
    (proxy,) = mesh.pods("nodeproxy", node=one)

    def token(pod: str, account: str) -> str:
        """A token of kubelet's kind, bound to a pod."""
        return cluster.kubectl(
            *("create", "token", account, "-n", namespace, "--audience=mycel.io", "--duration=10m"),
            *("--bound-object-kind=Pod", f"--bound-object-name={pod}"),
        ).strip()

    tokens = {c: token(mesh.pods(c, node=one)[0], f"mycel-{c}") for c in ("agent", "nodeproxy", "l7proxy")}
    # And the one that the node proxy has itself, where its container can be looked into.
    with contextlib.suppress(LabError):
        tokens["nodeproxy"] = cluster.kubectl("exec", "-n", namespace, proxy, "--", "cat", _TOKEN).strip()
    ordinary = cluster.kubectl(
        *("create", "token", f"client-{one}", "-n", apps.namespace, "--audience=mycel.io"),
        *("--bound-object-kind=Pod", f"--bound-object-name={here.name}"),
    ).strip()
    denied, unknown = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
    roots = set()
    for pod in mesh.pods("controlplane"):
        before = metric(mesh, pod, "mycel_ca_requests_refused_total")
        with controller(mesh, pod) as channel:
            answer = sign(channel, tokens["nodeproxy"], here.uid)
            roots.add(answer.roots)
            (leaf, *_) = (x509.load_der_x509_certificate(c) for c in answer.chain)
            san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert [n.value for n in san] == [f"spiffe://cluster.local/ns/{apps.namespace}/sa/client-{one}"]
            assert refused(channel, tokens["nodeproxy"], there.uid) is denied, "a pod of another node"
            assert refused(channel, tokens["agent"], here.uid) is denied
            assert refused(channel, tokens["l7proxy"], here.uid) is denied
            assert refused(channel, ordinary, here.uid) is unknown, "a pod asks for itself"
            assert refused(channel, "x", here.uid) is unknown
        assert metric(mesh, pod, "mycel_ca_requests_refused_total") == before + 1
        assert there.uid in cluster.kubectl("logs", "-n", namespace, pod, "--since=2m")
    assert len(roots) == 1, "all controllers sign under one root"


def waits_for(cluster: Kubernetes, namespace: str, what: str, condition: str, seconds: int = 30) -> None:
    cluster.kubectl("wait", "-n", namespace, what, f"--for=condition={condition}", f"--timeout={seconds}s")


def test_status_of_policy_objects(mesh: Mesh, apps: Apps) -> None:
    cluster, namespace = mesh.cluster, apps.namespace
    cluster.kubectl("label", "namespace", namespace, "mycel.io/mesh=enabled")
    apps.server("web")
    cluster.apply(POLICIES.format(namespace=namespace))
    for what in (
        "authorizationpolicies.security.istio.io/nobody",
        "peerauthentication/default",
        "virtualservice/web",
    ):
        waits_for(cluster, namespace, what, "Programmed")
    web = cluster.get("virtualservice", "web", "-n", namespace)
    assert web["status"]["observedGeneration"] == web["metadata"]["generation"]
    cluster.apply(BROKEN.format(namespace=namespace))
    waits_for(cluster, namespace, "virtualservice/web", "Accepted=False")
    web = cluster.get("virtualservice", "web", "-n", namespace)
    (accepted,) = [c for c in web["status"]["conditions"] if c["type"] == "Accepted"]
    assert "subset v9" in accepted["message"]
    assert accepted["observedGeneration"] == web["metadata"]["generation"]
    cluster.apply(POLICIES.format(namespace=namespace))
    waits_for(cluster, namespace, "virtualservice/web", "Programmed")
    # All is said, so nothing more is written.
    version = cluster.get("virtualservice", "web", "-n", namespace)["metadata"]["resourceVersion"]
    time.sleep(3)
    assert cluster.get("virtualservice", "web", "-n", namespace)["metadata"]["resourceVersion"] == version
