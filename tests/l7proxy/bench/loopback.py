"""Requests per second through the proxy on loopback, for work on its hot path: ``python tests/l7proxy/bench/loopback.py``.

A namespace of its own with nginx and wrk in it; nothing of the mesh but l7proxy. What users care about is measured by
``make bench``; this one is for comparing two versions of this code, in seconds, also under a profiler.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import os
import pstats
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from l7proxy.accesslog import AccessLog
from l7proxy.resources import Resources
from l7proxy.server import Proxy
from tests.l7proxy.fakes import xds
from tests.l7proxy.fakes.agent import FakeAgent

_NGINX = """
daemon off; worker_processes 1; pid {0}/pid; error_log {0}/error; events {{ worker_connections 2048; }}
http {{ access_log off; keepalive_requests 100000000; client_body_temp_path {0}/b;
server {{ listen 127.0.0.1:18080 reuseport; location / {{ return 200 "0123456789012345678901234567890123456789"; }} }} }}
"""
_UNIQUE = (
    "local n = 0\nrequest = function() n = n + 1; wrk.headers['x-n'] = tostring(n); "
    "return wrk.format(nil, '/?n=' .. n) end"
)
_CONSTANT = "request = function() return wrk.format(nil, '/') end"
_BROWSER = (
    "wrk.headers['user-agent'] = 'Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0'\n"
    "wrk.headers['accept'] = 'text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8'\n"
    "wrk.headers['accept-language'] = 'en-US,en;q=0.5'\nwrk.headers['cookie'] = 'session=0123456789abcdef; theme=dark'\n"
)


async def _proxy(arguments: argparse.Namespace, run: Path) -> None:
    agent = FakeAgent(run)
    agent.start()
    proxy = Proxy(
        node="node-a",
        run=str(run),
        access_log=AccessLog(str(run / "access.log")),
        captured=lambda cookie, peer: (xds.VIP, xds.PORT),
    )
    proxy.start()
    resources = Resources()
    timeout = "15s" if arguments.timeout else "0s"
    route = {
        "match": {"prefix": "/"},
        "route": {
            "weighted_clusters": {
                "clusters": [
                    {"name": xds.cluster_name("v1"), "weight": 80},
                    {"name": xds.cluster_name("v2"), "weight": 20},
                ]
            },
            "timeout": timeout,
            "retry_policy": {
                "retry_on": "connect-failure,refused-stream,unavailable,cancelled,503",
                "num_retries": 2,
            },
        },
    }
    xds.apply(
        resources,
        xds.listener(),
        xds.routes(route, include_request_attempt_count=True),
        xds.cluster("v1"),
        xds.cluster("v2"),
        xds.assignment(xds.endpoint(18080), subset="v1"),
        xds.assignment(xds.endpoint(18080), subset="v2"),
    )
    proxy.publish(resources.build())
    await agent.connected()
    address = agent.enroll("client")
    (run / "port").write_text(str(address[1]))
    profile = cProfile.Profile() if arguments.profile else None
    if profile:
        await asyncio.sleep(1.5)
        profile.enable()
    try:
        while not (run / "stop").exists():  # noqa: ASYNC110 - another process says so
            await asyncio.sleep(0.1)
    finally:
        if profile:
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(38)
    await proxy.drain(0.5)
    agent.stop()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, nargs="*", default=[32])
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--timeout", action="store_true", help="a route with a timeout")
    parser.add_argument("--heads", choices=["same", "unique", "lua", "browser"], default="same")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--direct", action="store_true", help="measure nginx alone too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        uvloop.run(_proxy(arguments, Path(arguments.child)))
        return
    namespace = f"ml7-{os.getpid()}"
    enter = ["ip", "netns", "exec", namespace]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        run = Path(folder)
        subprocess.run(["ip", "netns", "add", namespace], check=True)
        stack.callback(subprocess.run, ["ip", "netns", "del", namespace], check=False)
        subprocess.run([*enter, "ip", "link", "set", "lo", "up"], check=True)
        (run / "nginx.conf").write_text(_NGINX.format(folder))
        nginx = subprocess.Popen(
            [*enter, "/usr/sbin/nginx", "-c", f"{folder}/nginx.conf", "-p", folder], stderr=subprocess.DEVNULL
        )
        stack.callback(nginx.wait, 5)
        stack.callback(nginx.terminate)
        flags = [f"--{name}" for name in ("profile", "timeout") if getattr(arguments, name)]
        child = subprocess.Popen([*enter, sys.executable, __file__, "--child", folder, *flags])
        stack.callback(child.wait, 5)
        stack.callback((run / "stop").touch)
        deadline = time.monotonic() + 10
        while not (run / "port").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        script = run / "wrk.lua"
        script.write_text(
            {"same": "", "unique": _UNIQUE, "lua": _CONSTANT, "browser": _BROWSER}[arguments.heads]
        )
        targets = [("l7proxy", (run / "port").read_text())] + (
            [("nginx", "18080")] if arguments.direct else []
        )
        for clients in arguments.clients:
            for name, port in targets:
                before = _cpu(child.pid)
                started = time.monotonic()
                out = subprocess.run(
                    [*enter, "wrk", "-t1", f"-c{clients}", f"-d{arguments.seconds}s", "--latency", "-s", str(script), f"http://127.0.0.1:{port}/"],
                    capture_output=True, text=True, check=True, timeout=30,
                ).stdout  # fmt: skip
                rate = re.search(r"Requests/sec:\s+([\d.]+)", out)
                p50 = re.search(r"50%\s+(\S+)", out)
                p99 = re.search(r"99%\s+(\S+)", out)
                bad = re.search(r"Non-2xx.*|Socket errors.*", out)
                assert rate and p50 and p99
                busy = (_cpu(child.pid) - before) / (time.monotonic() - started)
                per_request = busy / float(rate[1]) * 1e6 if busy else 0
                print(
                    f"{name} c={clients}: {float(rate[1]):,.0f}/s p50 {p50[1]} p99 {p99[1]} cpu {busy:.2f} "
                    f"({per_request:.1f} us a request) {bad[0] if bad else ''}"
                )


def _cpu(pid: int) -> float:
    """Seconds of CPU time of a process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
