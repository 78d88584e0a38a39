"""Where the API server is and how to prove who we are: kubeconfig files and the pod's own service account.

Owns reading them (merged as kubectl merges ``$KUBECONFIG``), exec credential plugins (``client.authentication.k8s.io/v1``),
and following files that are rotated: token, CA and client certificate. It speaks to no server. Proxies of the environment are
not honoured, ``proxy-url`` of a kubeconfig is.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import os
import ssl
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import yaml

#: Mounted by kubelet into every pod that has a service account token.
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: Seconds until a token file is read again (kubelet replaces it well before it expires).
_TOKEN_AGE = 10.0
#: Seconds that an exec plugin may take, and by which its credential is renewed before it expires.
_EXEC_TIMEOUT = 30.0
_EXEC_MARGIN = 10.0
_EXEC_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")


class AccessError(Exception):
    """No usable way to an API server: the file, the field and the reason."""


@dataclass
class Access:
    """How to reach one API server. Use :meth:`load`; credentials are asked for before each request."""

    server: str  #: ``https://HOST:PORT``, no slash at the end
    namespace: str = "default"  #: of the context
    server_name: str | None = None  #: name in the server's certificate, when it is not the host's
    proxy: str | None = None
    insecure: bool = False
    ca: bytes | Path | None = None  #: PEM, or the file that holds it; None trusts the system's
    certificate: tuple[bytes | Path, bytes | Path] | None = None  #: the client's chain and key, PEM
    token: str | None = None
    token_file: Path | None = None
    exec: Mapping[str, Any] | None = None  #: a kubeconfig's ``exec``
    headers: tuple[tuple[str, str], ...] = ()  #: impersonation, basic credentials
    _token_read: float = field(default=-1e9, repr=False)
    _exec_until: float = field(default=-1e9, repr=False)
    _exec_certificate: tuple[bytes, bytes] | None = field(default=None, repr=False)
    _exec_lock: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)
    _tls: tuple[object, ssl.SSLContext] | None = field(default=None, repr=False)

    @classmethod
    def load(cls, kubeconfig: Path | None = None, context: str | None = None) -> Self:
        """The file given; else ``$KUBECONFIG``; else ``~/.kube/config``; else the pod's own service account.

        :raises AccessError: none of these is there, or it is not usable.
        """
        if kubeconfig is not None:
            return cls._from_files([kubeconfig], context)
        if named := os.environ.get("KUBECONFIG"):
            return cls._from_files([Path(p) for p in named.split(os.pathsep) if p], context)
        # Not Path.home(): a container's user may have no home at all.
        default = Path(os.path.expanduser("~/.kube/config"))
        if default.is_file():
            return cls._from_files([default], context)
        if context is None and os.environ.get("KUBERNETES_SERVICE_HOST"):
            return cls.in_cluster()
        raise AccessError(f"no API server known: KUBECONFIG is not set, {default} does not exist, no pod")

    @classmethod
    def in_cluster(cls, folder: Path = _SERVICE_ACCOUNT) -> Self:
        """The pod's service account.

        :raises AccessError: this is no pod, or its token is not mounted.
        """
        host = os.environ.get("KUBERNETES_SERVICE_HOST", "")
        port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        token = folder / "token"
        if not host or not token.exists():
            raise AccessError(
                f"not in a pod with a service account: no KUBERNETES_SERVICE_HOST or no {token}"
            )
        host = f"[{host}]" if ":" in host else host
        namespace = folder / "namespace"
        return cls(
            server=f"https://{host}:{port}",
            namespace=namespace.read_text().strip() if namespace.exists() else "default",
            ca=folder / "ca.crt",
            token_file=token,
        )

    @classmethod
    def _from_files(cls, files: list[Path], context: str | None) -> Self:
        config = _merge(files)
        name = context or config["current-context"]
        if not name:
            raise AccessError(f"{_names(files)}: current-context is not set, and no context was named")
        chosen = _named(config, "contexts", name, files).get("context") or {}
        cluster_entry = _named(config, "clusters", chosen.get("cluster") or "", files)
        cluster, base = cluster_entry.get("cluster") or {}, cluster_entry["_base"]
        server = str(cluster.get("server") or "").rstrip("/")
        if not server.startswith(("https://", "http://")):
            raise AccessError(
                f"{_names(files)}: cluster {chosen.get('cluster')}: server is no URL: {server!r}"
            )
        result = cls(
            server=server,
            namespace=chosen.get("namespace") or "default",
            server_name=cluster.get("tls-server-name") or None,
            proxy=cluster.get("proxy-url") or None,
            insecure=bool(cluster.get("insecure-skip-tls-verify")),
            ca=_pem(cluster, "certificate-authority", base),
        )
        if chosen.get("user"):
            user_entry = _named(config, "users", chosen["user"], files)
            result._take_user(user_entry.get("user") or {}, user_entry["_base"], chosen["user"])
        return result

    def _take_user(self, user: Mapping[str, Any], base: Path, name: str) -> None:
        if "auth-provider" in user and "exec" not in user:
            raise AccessError(f"user {name}: auth-provider was removed from Kubernetes in 1.26; use exec")
        certificate = _pem(user, "client-certificate", base)
        key = _pem(user, "client-key", base)
        if (certificate is None) != (key is None):
            raise AccessError(f"user {name}: client-certificate and client-key go together")
        if certificate is not None and key is not None:
            self.certificate = (certificate, key)
        self.token = user.get("token") or None
        if user.get("tokenFile"):
            self.token_file = base / user["tokenFile"]
        if user.get("exec"):
            self.exec = user["exec"]
            if self.exec.get("apiVersion") not in _EXEC_VERSIONS or not self.exec.get("command"):
                raise AccessError(f"user {name}: exec wants a command and apiVersion {_EXEC_VERSIONS[0]}")
        headers: list[tuple[str, str]] = []
        if user.get("username"):
            pair = f"{user['username']}:{user.get('password') or ''}"
            headers.append(("Authorization", "Basic " + base64.b64encode(pair.encode()).decode()))
        if user.get("as"):
            headers.append(("Impersonate-User", user["as"]))
            headers += [("Impersonate-Group", group) for group in user.get("as-groups") or ()]
        self.headers = tuple(headers)

    async def authorization(self) -> list[tuple[str, str]]:
        """Headers of the next request. Reads the token file again when it is old, runs the plugin when it must.

        :raises AccessError: the token cannot be read, the plugin failed.
        """
        if self.exec is not None:
            await self._run_plugin()
        elif self.token_file is not None and time.monotonic() - self._token_read >= _TOKEN_AGE:
            try:
                self.token = self.token_file.read_text().strip()
            except OSError as e:
                if not self.token:
                    raise AccessError(f"token {self.token_file}: {e.strerror}") from e
            self._token_read = time.monotonic()
        bearer = [("Authorization", f"Bearer {self.token}")] if self.token else []
        return [*self.headers, *bearer]

    def refused(self) -> None:
        """The server said 401: read token and plugin again at the next request."""
        self._token_read = self._exec_until = -1e9

    def tls(self) -> ssl.SSLContext | None:
        """The context for the next connection; another one once a file that it was made from was replaced.

        :raises AccessError: a certificate cannot be read.
        """
        if not self.server.startswith("https://"):
            return None
        pair = self._exec_certificate or self.certificate
        try:
            sources = [s for s in (self.ca, *(pair or ())) if s is not None]
            state = [_signature(s) for s in sources]
            if self._tls is None or self._tls[0] != state:
                self._tls = state, self._make_tls(pair)
        except (OSError, ssl.SSLError, ValueError) as e:
            if self._tls is None:
                raise AccessError(f"certificates for {self.server} cannot be read: {e}") from e
        return self._tls[1]

    def _make_tls(self, pair: tuple[bytes | Path, bytes | Path] | None) -> ssl.SSLContext:
        if self.insecure:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif self.ca is not None:
            data = self.ca.read_bytes() if isinstance(self.ca, Path) else self.ca
            context = ssl.create_default_context(cadata=data.decode("ascii"))
        else:
            context = ssl.create_default_context()
        # Clusters' own CAs lack extensions that Python 3.13 asks for by default.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        if pair is not None:
            with _as_file(pair[0]) as certificate, _as_file(pair[1]) as key:
                context.load_cert_chain(certificate, key)
        return context

    async def _run_plugin(self) -> None:
        async with self._exec_lock:
            if time.time() < self._exec_until:
                return
            assert self.exec is not None
            command = str(self.exec["command"])
            status = await _plugin(command, self.exec, self._cluster_information())
            self.token = status.get("token") or None
            if status.get("clientCertificateData"):
                pair = status["clientCertificateData"], status.get("clientKeyData") or ""
                self._exec_certificate = pair[0].encode(), pair[1].encode()
            if not self.token and not self._exec_certificate:
                raise AccessError(f"credential plugin {command}: neither token nor certificate in its answer")
            self._exec_until = _expiry(status.get("expirationTimestamp"))

    def _cluster_information(self) -> dict[str, Any]:
        result: dict[str, Any] = {"server": self.server, "insecure-skip-tls-verify": self.insecure}
        if self.ca is not None:
            data = self.ca.read_bytes() if isinstance(self.ca, Path) else self.ca
            result["certificate-authority-data"] = base64.b64encode(data).decode()
        return result


async def _plugin(command: str, config: Mapping[str, Any], cluster: Mapping[str, Any]) -> dict[str, Any]:
    """Run a credential plugin and return its answer's ``status``."""
    spec: dict[str, Any] = {"interactive": False}
    if config.get("provideClusterInfo"):
        spec["cluster"] = cluster
    info = {"apiVersion": config["apiVersion"], "kind": "ExecCredential", "spec": spec}
    environment = os.environ | {e["name"]: e["value"] for e in config.get("env") or ()}
    environment["KUBERNETES_EXEC_INFO"] = json.dumps(info)
    try:
        process = await asyncio.create_subprocess_exec(
            command,
            *(str(a) for a in config.get("args") or ()),
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as e:
        hint = config.get("installHint") or ""
        raise AccessError(f"credential plugin {command}: {e.strerror}. {hint}".rstrip(". ")) from e
    try:
        output, error = await asyncio.wait_for(process.communicate(), _EXEC_TIMEOUT)
    except BaseException as e:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(e, TimeoutError):
            raise AccessError(f"credential plugin {command}: no answer in {_EXEC_TIMEOUT:.0f} s") from e
        raise
    if process.returncode:
        said = error.decode(errors="replace").strip()[-300:]
        raise AccessError(f"credential plugin {command}: exit status {process.returncode}: {said}")
    try:
        answer = json.loads(output)
        if answer["kind"] != "ExecCredential" or answer["apiVersion"] != config["apiVersion"]:
            raise ValueError(f"kind {answer['kind']} {answer['apiVersion']}")
        return dict(answer["status"])
    except (ValueError, LookupError, TypeError) as e:
        raise AccessError(f"credential plugin {command}: no ExecCredential in its output: {e}") from e


def _expiry(text: str | None) -> float:
    if not text:
        return float("inf")
    try:
        return datetime.fromisoformat(text).timestamp() - _EXEC_MARGIN
    except ValueError as e:
        raise AccessError(f"credential plugin: expirationTimestamp {text!r} is no time") from e


def _merge(files: list[Path]) -> dict[str, Any]:
    """As kubectl does: of every name the first file's entry, the first current-context. Entries carry their folder."""
    result: dict[str, Any] = {"clusters": [], "users": [], "contexts": [], "current-context": ""}
    found = False
    for file in files:
        try:
            config = yaml.load(file.read_bytes(), Loader=yaml.CSafeLoader) or {}
            for section in ("clusters", "users", "contexts"):
                known = {e["name"] for e in result[section]}
                result[section] += [
                    {**e, "_base": file.resolve().parent}
                    for e in config.get(section) or ()
                    if e["name"] not in known
                ]
            result["current-context"] = result["current-context"] or config.get("current-context") or ""
            found = True
        except FileNotFoundError:
            continue
        except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError) as e:
            raise AccessError(f"kubeconfig {file} cannot be read: {e}") from e
    if not found:
        raise AccessError(f"kubeconfig {_names(files)} does not exist")
    return result


def _named(config: Mapping[str, Any], section: str, name: str, files: list[Path]) -> dict[str, Any]:
    for entry in config[section]:
        if entry["name"] == name:
            return dict(entry)
    raise AccessError(f"{_names(files)}: {section} has no {name!r}")


def _pem(entry: Mapping[str, Any], name: str, base: Path) -> bytes | Path | None:
    """``NAME-data`` (base64) goes before ``NAME`` (a file, relative to the kubeconfig)."""
    if data := entry.get(f"{name}-data"):
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError, TypeError) as e:
            raise AccessError(f"{name}-data is not base64: {e}") from e
    return base / entry[name] if entry.get(name) else None


def _signature(source: bytes | Path) -> object:
    if isinstance(source, bytes):
        return source
    status = source.stat()
    return str(source), status.st_mtime_ns, status.st_size, status.st_ino


@contextlib.contextmanager
def _as_file(source: bytes | Path) -> Iterator[Path]:
    """The ssl module reads certificates from files only. One that we make is gone when this ends."""
    if isinstance(source, Path):
        yield source
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(source)
        file.flush()
        yield Path(file.name)


def _names(files: list[Path]) -> str:
    return os.pathsep.join(str(f) for f in files)
