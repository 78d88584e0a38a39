"""A real Envoy as xDS client: it takes everything, and serves what the model says."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.controlplane.support import (
    TOKENS,
    Harness,
    eventually,
    istio,
    pod,
    service,
    subsets,
    two_versions,
    write,
)
from tests.requirements import ENVOY


def bootstrap(harness: Harness, folder: Path, admin: int) -> Path:
    """Envoy's own configuration: the controller over TLS, with the node's credential."""
    config = {
        "node": {
            "id": "node-a/envoy",
            "cluster": "mycel",
            "metadata": {"ENVOY_SOCKET": str(folder / "l7.sock")},
        },
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin}}},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "GRPC",
                "transport_api_version": "V3",
                "grpc_services": [
                    {
                        "envoy_grpc": {"cluster_name": "controller"},
                        "initial_metadata": [{"key": "authorization", "value": f"Bearer {TOKENS['node-a']}"}],
                    }
                ],
            },
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
        },
        "static_resources": {
            "clusters": [
                {
                    "name": "controller",
                    "type": "STATIC",
                    "connect_timeout": "1s",
                    "load_assignment": {
                        "cluster_name": "controller",
                        "endpoints": [
                            {
                                "lb_endpoints": [
                                    {
                                        "endpoint": {
                                            "address": {
                                                "socket_address": {
                                                    "address": "127.0.0.1",
                                                    "port_value": harness.controller.port,
                                                }
                                            }
                                        }
                                    }
                                ]
                            }
                        ],
                    },
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                            "explicit_http_config": {"http2_protocol_options": {}},
                        }
                    },
                    "transport_socket": {
                        "name": "tls",
                        "typed_config": {
                            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                            "sni": "controller.test",
                            "common_tls_context": {
                                "alpn_protocols": ["h2"],
                                "validation_context": {
                                    "trusted_ca": {"filename": str(harness.state / "roots.pem")},
                                    "match_typed_subject_alt_names": [
                                        {"san_type": "DNS", "matcher": {"exact": "controller.test"}}
                                    ],
                                },
                            },
                        },
                    },
                }
            ]
        },
    }
    path = folder / "envoy.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Envoy:
    def __init__(self, harness: Harness, folder: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.admin = s.getsockname()[1]
        self.socket = folder / "l7.sock"
        self._config = bootstrap(harness, folder, self.admin)
        self._log = folder / "envoy.log"

    async def __aenter__(self) -> Envoy:
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(str(ENVOY), "-c", str(self._config), "--concurrency", "1"),
                *("--use-dynamic-base-id", "--log-level", "warning"),
                stdout=log,
                stderr=log,
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), 10)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def get(self, path: str) -> Any:
        def fetch() -> bytes:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}{path}", timeout=5) as answer:
                return bytes(answer.read())

        return json.loads(await asyncio.to_thread(fetch))

    async def request(self, destination: tuple[str, int], head: bytes) -> bytes:
        """One HTTP request on the unix socket, as the node proxy hands connections over."""
        reader, writer = await asyncio.open_unix_connection(str(self.socket))
        addresses = socket.inet_aton("10.1.0.9") + socket.inet_aton(destination[0])
        body = addresses + struct.pack("!HH", 40000, destination[1])
        writer.write(b"\r\n\r\n\0\r\nQUIT\n" + struct.pack("!BBH", 0x21, 0x11, len(body)) + body + head)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return answer

    def log(self) -> str:
        return self._log.read_text()


async def settled(harness: Harness, after: str = "", timeout: float = 20.0) -> dict[str, Any]:
    """Wait until the client has taken the newest snapshot, which is another than ``after``; its entry."""

    async def probe() -> bool:
        version = harness.controller.snapshot.version
        return version != after and any(c["version_acked"] == version for c in await harness.clients())

    await eventually(probe, timeout)
    (client,) = await harness.clients()
    return client


class Application:
    """A server for one connection at a time that keeps the PROXY header it got and answers with its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.headers: list[bytes] = []

    async def __aenter__(self) -> Application:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readexactly(16)
        self.headers.append(head + await reader.readexactly(struct.unpack("!H", head[14:])[0]))
        await reader.readuntil(b"\r\n\r\n")
        body = self.name.encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()


GET = b"GET %s HTTP/1.1\r\nhost: anything.test\r\nconnection: close\r\n%s\r\n"


@pytest.mark.timeout(90)
async def test_envoy_takes_all_and_routes(harness: Harness, tmp_path: Path) -> None:
    async with Application("v1") as v1, Application("v2") as v2:
        web = [
            *two_versions()[:2],
            pod("w1", "127.0.0.1", ports={"http": v1.port}, app="web-app", version="v1"),
            pod("w2", "127.0.0.1", node="node-b", ports={"http": v2.port}, app="web-app", version="v2"),
        ]
        web[1]["spec"]["ports"][0]["targetPort"] = "http"
        write(harness.config, "web.yaml", *web, subsets("web-app", "v1", "v2"))
        by_header = {
            "match": [{"headers": {"end-user": {"exact": "jason"}}, "uri": {"prefix": "/"}}],
            "route": [{"destination": {"host": "web-app", "subset": "v2"}}],
            "retries": {"attempts": 3, "perTryTimeout": "2s", "retryOn": "gateway-error,connect-failure,503"},
            "timeout": "5s",
        }
        routes = [
            by_header,
            {
                "match": [{"uri": {"exact": "/teapot"}}],
                "directResponse": {"status": 418, "body": {"string": "short"}},
            },
            {"match": [{"uri": {"regex": "/old/.*"}}], "redirect": {"uri": "/new", "redirectCode": 308}},
            {
                "match": [{"uri": {"prefix": "/missing"}}],
                "route": [{"destination": {"host": "web-app", "subset": "v9"}}],
            },
            {"route": [{"destination": {"host": "web-app", "subset": "v1"}}]},
        ]
        write(
            harness.config, "vs.yaml", istio("VirtualService", "web", {"hosts": ["web-app"], "http": routes})
        )
        async with harness.serving(), Envoy(harness, tmp_path) as envoy:
            client = await settled(harness)
            assert client["component"] == "envoy"
            assert client["nacks"] == 0, client["errors"]
            assert set(client["types"]) == {"CDS", "EDS", "LDS", "RDS"}

            vip = ("10.96.0.10", 80)
            assert (await envoy.request(vip, GET % (b"/", b""))).endswith(b"v1")
            assert (await envoy.request(vip, GET % (b"/", b"end-user: jason\r\n"))).endswith(b"v2")
            assert b" 418 " in (await envoy.request(vip, GET % (b"/teapot", b""))).splitlines()[0]
            redirect = await envoy.request(vip, GET % (b"/old/x", b""))
            assert b" 308 " in redirect.splitlines()[0]
            assert b"/new" in redirect
            assert b" 503 " in (await envoy.request(vip, GET % (b"/missing", b""))).splitlines()[0]
            # The client's own address reaches the endpoint: the node proxy needs it.
            assert v1.headers[0][16:20] == socket.inet_aton("10.1.0.9")

            # A change of all four types: clusters that are new before routes name them, the old ones until then.
            write(
                harness.config,
                "vs.yaml",
                istio(
                    "VirtualService",
                    "web",
                    {
                        "hosts": ["web-app"],
                        "http": [{"route": [{"destination": {"host": "web-app", "subset": "v2"}}]}],
                    },
                ),
                service(
                    "other", "10.96.0.11", selector={"app": "web-app"}, ports=[{"name": "http", "port": 81}]
                ),
                istio(
                    "VirtualService",
                    "other",
                    {"hosts": ["other"], "http": [{"route": [{"destination": {"host": "other"}}]}]},
                ),
            )
            async with asyncio.timeout(10):
                while not (await envoy.request(vip, GET % (b"/", b""))).endswith(b"v2"):
                    pass
            client = await settled(harness)
            assert client["nacks"] == 0, client["errors"]
            clusters = await envoy.get("/clusters?format=json")
            names = {c["name"] for c in clusters["cluster_statuses"]} - {"controller"}
            assert names == {
                "outbound|80||web-app.default.svc.cluster.local",
                "outbound|80|v2|web-app.default.svc.cluster.local",
                "outbound|81||other.default.svc.cluster.local",
            }

            # Endpoints come and go without anything else changing.
            version = harness.controller.snapshot.version
            write(harness.config, "web.yaml", *web[:3], subsets("web-app", "v1", "v2"))
            await settled(harness, version)
            assert b" 503 " in (await envoy.request(vip, GET % (b"/", b""))).splitlines()[0]

            # Everything goes: the listener too.
            version = harness.controller.snapshot.version
            (harness.config / "vs.yaml").unlink()
            client = await settled(harness, version)
            assert client["nacks"] == 0
            assert (await envoy.get("/listeners?format=json")).get("listener_statuses", []) == []
        assert "rejected" not in envoy.log()
