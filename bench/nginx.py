"""The server of nearly every row: nginx, one worker, forty bytes from memory, or 8 MB from a file."""

from __future__ import annotations

from pathlib import Path

from bench.loads import LARGE_BYTES

#: Rows dial this port; the policy figure closes and opens :data:`GUARDED`.
PORT = 8080
GUARDED = 8081
BODY_BYTES = 40


def body(name: str) -> str:
    """What the server called ``name`` answers: it tells who answered, at the same size for all."""
    return name.ljust(BODY_BYTES, ".")


def configure(folder: Path, name: str) -> list[str]:
    """Write a server's configuration into ``folder`` and give back its command line."""
    config = folder / "nginx.conf"
    large = folder / "large"
    large.write_bytes(bytes(LARGE_BYTES))
    config.write_text(f"""
daemon off;
master_process off;
worker_processes 1;
worker_rlimit_nofile 16384;
pid {folder}/nginx.pid;
error_log {folder}/nginx.err warn;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    sendfile on;
    default_type text/plain;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen {PORT} backlog=4096;
        listen {GUARDED} backlog=4096;
        location / {{ return 200 "{body(name)}"; }}
        location = /large {{ alias {large}; }}
    }}
}}
""")
    return ["/usr/sbin/nginx", "-e", f"{folder}/nginx.err", "-c", str(config)]
