"""The CNI plugin: chained last, it tells the node agent about each pod and passes the chain's result on unchanged.

Owns what the CNI specification (1.1.0) asks of a plugin's process: environment, standard input and output, error codes. It
makes no decision about a pod and never enters its namespace: the open descriptor goes to the agent with the request.

A runtime starts this process several times per pod, so the modules it imports are counted: a test holds the list, and
:mod:`cni.install` writes a launcher that leaves ``site`` out.

Keys of its own in the configuration:

``runDir``             the agent's run folder (default ``/run/mycel``)
``pinDir``             the agent's pins; only STATUS looks, to tell whether traffic flows without the agent
``outsideNamespaces``  namespaces of Kubernetes whose pods are never in the mesh: they pass without asking anybody
``nodeStatus``         what STATUS says: ``agent`` (default) whether the agent could serve ADD; ``ready`` that it could, always
``unknownPods``        ``refuse`` (default) or ``pass``: a pod without K8S_POD_UID, as podman's are, cannot be in the mesh
``timeout``            seconds that a call waits for the agent in all, 0.1 to 60 (default 15); some wait less
``logLevel``           ``debug``, ``info``, ``warning`` (default) or ``error``, on standard error

With the agent away, ADD waits for it until the timeout, because an upgrade is over by then, and is refused with "try again"
after that: a pod of the mesh never starts unnoticed. Pods of namespaces that the agent left word of as outside pass at once
when nobody is there, and after the timeout when whoever is there does not answer: it may just have heard otherwise.
"""

from __future__ import annotations

# The C module under ``socket``: the wrapper alone costs 2 ms of start-up (enum, selectors).
import _socket
import fcntl
import os
import sys
import time

from cni import fastjson, protocol

TYPE_CHECKING = False  # typing itself is not imported: 3 ms
if TYPE_CHECKING:
    from typing import Any, NoReturn

SUPPORTED = protocol.SUPPORTED
#: Commands that came after 0.3.1, and the first version that has them.
SINCE = {"CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"}
REQUIRED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "STATUS": (),
    "GC": (),
    "VERSION": (),
}
LEVELS = ("debug", "info", "warning", "error")

_ID_FIRST = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_ID_REST = _ID_FIRST | frozenset("_.-")
_NS_GET_NSTYPE = 0xB703  # linux/nsfs.h
_CLONE_NEWNET = 0x40000000
_MAX_REPLY = 128 * 1024
#: Seconds between two attempts to reach an agent that is away.
_AGAIN = 0.1


class CniError(Exception):
    """What the runtime is told: the specification's error object."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details


class AgentAway(Exception):
    """The agent does not answer: not running, or hanging."""


class AgentConfused(AgentAway):
    """What answers is no agent that we understand: asking again makes no difference."""


class Settings:
    """The plugin's own keys, checked."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.run_dir = _text(config, "runDir", "/run/mycel")
        self.pin_dir = _text(config, "pinDir", "/sys/fs/bpf/mycel")
        for key, value in (("runDir", self.run_dir), ("pinDir", self.pin_dir)):
            if not value.startswith("/"):
                raise _invalid(key, value, "not an absolute path")
        self.node_status = _text(config, "nodeStatus", "agent")
        if self.node_status not in ("agent", "ready"):
            raise _invalid("nodeStatus", self.node_status, "neither agent nor ready")
        self.unknown_pods = _text(config, "unknownPods", "refuse")
        if self.unknown_pods not in ("pass", "refuse"):
            raise _invalid("unknownPods", self.unknown_pods, "neither pass nor refuse")
        self.log_level = _text(config, "logLevel", "warning")
        if self.log_level not in LEVELS:
            raise _invalid("logLevel", self.log_level, "none of " + ", ".join(LEVELS))
        outside = config.get("outsideNamespaces", [])
        if not isinstance(outside, list) or not all(isinstance(name, str) for name in outside):
            raise _invalid("outsideNamespaces", outside, "not a list of names")
        self.outside = outside
        timeout = config.get("timeout", protocol.REPLY_TIMEOUT)
        if (
            isinstance(timeout, bool)
            or not isinstance(timeout, (int, float))
            or not 0.1 <= timeout <= protocol.LONGEST_TIMEOUT
        ):
            raise _invalid("timeout", timeout, "not a number of seconds from 0.1 to 60")
        self.timeout = float(timeout)

    def log(self, level: str, text: str) -> None:
        if sys.stderr is not None and LEVELS.index(level) >= LEVELS.index(self.log_level):
            sys.stderr.write(f"mycel-cni: {level}: {text}\n")


class Attachment:
    """The parameters of one call, from the environment."""

    def __init__(self, command: str, environment: dict[str, str]) -> None:
        missing = [name for name in REQUIRED[command] if not environment.get(name)]
        if missing:
            raise CniError(protocol.ERR_INVALID_ENVIRONMENT, "missing or empty: " + ", ".join(missing))
        self.container_id = environment.get("CNI_CONTAINERID", "")
        self.ifname = environment.get("CNI_IFNAME", "")
        self.netns = environment.get("CNI_NETNS", "")
        if REQUIRED[command]:
            _check_container_id(self.container_id)
            _check_ifname(self.ifname)
        try:
            arguments = _arguments(environment.get("CNI_ARGS", ""))
        except CniError:
            # A pod must be removable whatever its arguments are, and DEL does not need them.
            if command != "DEL":
                raise
            arguments = {}
        self.pod_uid = arguments.get("K8S_POD_UID", "")
        self.pod_namespace = arguments.get("K8S_POD_NAMESPACE", "")
        self.pod_name = arguments.get("K8S_POD_NAME", "")


def run(environment: dict[str, str], stdin: int) -> tuple[int, dict[str, Any] | None]:
    """One call of the plugin: exit status, and what goes to standard output (if anything)."""
    version = SUPPORTED[-1]
    try:
        command = environment.get("CNI_COMMAND", "")
        if command not in REQUIRED:
            raise CniError(
                protocol.ERR_INVALID_ENVIRONMENT,
                f"CNI_COMMAND is {command!r}, not one of {', '.join(REQUIRED)}"
                if command
                else "CNI_COMMAND is not set",
            )
        attachment = Attachment(command, environment)
        config = _read_config(stdin)
        if command == "VERSION":
            given = config.get("cniVersion", version)
            return 0, {"cniVersion": given, "supportedVersions": list(SUPPORTED)}
        version = _negotiate(command, config)
        name = config.get("name")
        if not isinstance(name, str) or not name:
            raise CniError(protocol.ERR_INVALID_CONFIG, f"name: {name!r} is no network name")
        settings = Settings(config)
        return 0, _COMMANDS[command](settings, attachment, config, version)
    except CniError as error:
        return 1, _error(version, error)
    except AgentAway as error:
        return 1, _error(
            version, CniError(protocol.ERR_TRY_AGAIN, "the node agent does not answer", str(error))
        )
    except Exception as error:  # the runtime has to get an error object whatever happens
        import traceback

        traceback.print_exc()
        return 1, _error(
            version, CniError(protocol.ERR_INTERNAL, "internal error", f"{type(error).__name__}: {error}")
        )


def _add(settings: Settings, attachment: Attachment, config: dict[str, Any], version: str) -> dict[str, Any]:
    previous = _previous(config)
    addresses = _addresses(previous, attachment.ifname)
    # The namespace is opened before anything else is decided: a wrong path is an error for every pod.
    netns = _open_netns(attachment.netns)
    try:
        if attachment.pod_namespace in settings.outside:
            settings.log("debug", f"namespace {attachment.pod_namespace} is outside of the mesh: passed by")
        elif attachment.pod_uid:
            _add_by_agent(settings, attachment, config, addresses, netns)
        elif settings.unknown_pods == "refuse":
            raise CniError(
                protocol.ERR_REFUSED,
                "pod cannot be identified: CNI_ARGS has no K8S_POD_UID",
                "unknownPods is refuse; with pass, such a pod runs outside the mesh",
            )
        else:
            settings.log(
                "info",
                f"container {attachment.container_id} has no K8S_POD_UID: passed by (unknownPods is pass)",
            )
    finally:
        os.close(netns)
    return {**previous, "cniVersion": version}


def _add_by_agent(
    settings: Settings, attachment: Attachment, config: dict[str, Any], addresses: list[str], netns: int
) -> None:
    deadline = time.monotonic() + settings.timeout
    while True:
        try:
            _require(_ask("ADD", settings, attachment, config, deadline, addresses, netns))
            return
        except AgentAway as error:
            if attachment.pod_namespace in protocol.read_outside(settings.run_dir):
                settings.log(
                    "warning", f"{error}: namespace {attachment.pod_namespace} is outside, its pod passes"
                )
                return
            if isinstance(error, AgentConfused) or time.monotonic() + _AGAIN >= deadline:
                raise
        time.sleep(_AGAIN)


def _check(settings: Settings, attachment: Attachment, config: dict[str, Any], version: str) -> None:
    previous = _previous(config)
    addresses = _addresses(previous, attachment.ifname)
    netns = _open_netns(attachment.netns)
    try:
        if attachment.pod_namespace not in settings.outside and (
            attachment.pod_uid or settings.unknown_pods == "refuse"
        ):
            deadline = time.monotonic() + settings.timeout
            _require(_ask("CHECK", settings, attachment, config, deadline, addresses, netns))
    finally:
        os.close(netns)


def _del(settings: Settings, attachment: Attachment, config: dict[str, Any], version: str) -> None:
    outside = attachment.pod_namespace in settings.outside
    wait = min(settings.timeout, protocol.BRIEF_TIMEOUT if outside else protocol.DEL_TIMEOUT)
    try:
        answer = _ask("DEL", settings, attachment, config, time.monotonic() + wait)
        failed = str(answer.get("message") or answer["code"]) if answer["code"] else ""
    except AgentAway as error:
        failed = str(error)
    if not failed:
        return
    # Never fail: a runtime that cannot remove a pod keeps trying for ever. The agent works the note off when it is back.
    settings.log(
        "warning", f"clean-up of {attachment.container_id} {attachment.ifname} is left for later: {failed}"
    )
    try:
        protocol.write_note(
            settings.run_dir,
            protocol.request(
                "DEL",
                container_id=attachment.container_id,
                ifname=attachment.ifname,
                network=config["name"],
                netns=attachment.netns,
            ),
        )
    except OSError as error:
        # Then there is no agent on this machine, or it sees at its next start that the namespace is gone.
        settings.log("error", f"clean-up could not be noted: {error}")


def _status(settings: Settings, attachment: Attachment, config: dict[str, Any], version: str) -> None:
    try:
        _status_of_agent(settings, attachment, config)
    except CniError as error:
        # A runtime takes it for the whole node: no pod would start, not even the controller that the agent waits for.
        if settings.node_status != "ready":
            raise
        settings.log("warning", f"not ready for pods of the mesh: {error.message} {error.details}")


def _status_of_agent(settings: Settings, attachment: Attachment, config: dict[str, Any]) -> None:
    wait = settings.timeout
    if settings.node_status == "ready":
        wait = min(wait, protocol.BRIEF_TIMEOUT)
    try:
        _require(_ask("STATUS", settings, attachment, config, time.monotonic() + wait))
    except AgentAway as error:
        try:
            pinned = bool(os.listdir(settings.pin_dir))
        except OSError:
            pinned = False
        if pinned:
            raise CniError(protocol.ERR_NOT_AVAILABLE, "agent does not answer", str(error)) from None
        raise CniError(
            protocol.ERR_LIMITED,
            "agent does not answer, and no program of it is loaded",
            f"{error}; {settings.pin_dir}",
        ) from None


def _gc(settings: Settings, attachment: Attachment, config: dict[str, Any], version: str) -> None:
    key = "cni.dev/valid-attachments"
    given = config.get(key)
    if not isinstance(given, list):
        raise CniError(protocol.ERR_INVALID_CONFIG, f"{key} is missing or no list: nothing is removed")
    valid: list[list[str]] = []
    for index, item in enumerate(given):
        container, ifname = (
            (item.get("containerID"), item.get("ifname")) if isinstance(item, dict) else (None, None)
        )
        if not isinstance(container, str) or not isinstance(ifname, str):
            raise CniError(
                protocol.ERR_INVALID_CONFIG, f"{key}[{index}]: needs containerID and ifname", repr(item)
            )
        valid.append([container, ifname])
    _require(_ask("GC", settings, attachment, config, time.monotonic() + settings.timeout, valid=valid))


_COMMANDS = {"ADD": _add, "DEL": _del, "CHECK": _check, "STATUS": _status, "GC": _gc}


def _ask(
    command: str,
    settings: Settings,
    attachment: Attachment,
    config: dict[str, Any],
    deadline: float,
    addresses: list[str] | None = None,
    netns: int = -1,
    valid: list[list[str]] | None = None,
) -> dict[str, Any]:
    """Send the request and wait for the reply until ``deadline`` (of :func:`time.monotonic`).

    :raises AgentAway: no reply until then, whatever the reason.
    """
    begin = time.monotonic()
    message = protocol.request(
        command,
        container_id=attachment.container_id,
        ifname=attachment.ifname,
        network=config["name"],
        netns=attachment.netns,
        addresses=addresses,
        pod_uid=attachment.pod_uid,
        pod_namespace=attachment.pod_namespace,
        pod_name=attachment.pod_name,
        valid_attachments=valid,
        patience_ms=int(1000 * max(0.0, deadline - begin)),
    )
    path = settings.run_dir + "/" + protocol.SOCKET_NAME
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC, 0)
    try:
        # One option for all: the larger of our own requests fits (see common.seqpacket.prepare).
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, 4 * _MAX_REPLY)
        sock.settimeout(_left(deadline))
        sock.connect(path)
        rights = (
            [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, netns.to_bytes(4, sys.byteorder))] if netns >= 0 else []
        )
        sock.sendmsg([message], rights)
        sock.settimeout(_left(deadline))
        data = sock.recv(_MAX_REPLY)
    except TimeoutError:
        raise AgentAway(f"{path}: no reply within {max(0.0, deadline - begin):.1f} s") from None
    except OSError as error:
        raise AgentAway(f"{path}: {error.strerror or error}") from None
    finally:
        sock.close()
    if not data:
        raise AgentAway(f"{path}: the agent ended the connection without a reply")
    try:
        answer = protocol.decode(data)
    except protocol.ProtocolError as error:
        raise AgentConfused(f"{path}: {error}") from None
    code = answer.get("code")
    if isinstance(code, bool) or not isinstance(code, int):
        raise AgentConfused(f"{path}: reply without a code")
    return answer


def _left(deadline: float) -> float:
    """:raises TimeoutError: it is over."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _require(answer: dict[str, Any]) -> None:
    """:raises CniError: the agent's answer is one."""
    if answer["code"]:
        raise CniError(answer["code"], str(answer.get("message", "")), str(answer.get("details", "")))


def _read_config(stdin: int) -> dict[str, Any]:
    chunks = []
    try:
        while chunk := os.read(stdin, 1 << 16):
            chunks.append(chunk)
    except OSError as error:
        raise CniError(
            protocol.ERR_IO, "configuration cannot be read from standard input", str(error)
        ) from None
    if not chunks:
        raise CniError(protocol.ERR_IO, "standard input is empty")
    try:
        config = fastjson.loads(b"".join(chunks))
    except ValueError as error:
        raise CniError(protocol.ERR_DECODE, "configuration is no JSON", str(error)) from None
    except RecursionError:
        raise CniError(protocol.ERR_DECODE, "configuration is nested too deeply") from None
    if not isinstance(config, dict):
        raise CniError(protocol.ERR_DECODE, f"configuration is a JSON {type(config).__name__}, not an object")
    version = config.get("cniVersion", SUPPORTED[-1])
    if not isinstance(version, str) or not all(part.isdigit() for part in version.split(".")):
        raise CniError(protocol.ERR_DECODE, f"cniVersion: {version!r} is no version")
    return config


def _negotiate(command: str, config: dict[str, Any]) -> str:
    # Without one it is 0.1.0 (specification, "Configuration format"), which is too old.
    version: str = config.get("cniVersion", "0.1.0")
    if version not in SUPPORTED:
        raise CniError(
            protocol.ERR_INCOMPATIBLE_VERSION,
            f"cniVersion {version} is not supported",
            "supported: " + ", ".join(SUPPORTED),
        )
    since = SINCE.get(command, SUPPORTED[0])
    if SUPPORTED.index(version) < SUPPORTED.index(since):
        raise CniError(
            protocol.ERR_INCOMPATIBLE_VERSION,
            f"{command} came with {since}, the configuration is of {version}",
        )
    return version


def _previous(config: dict[str, Any]) -> dict[str, Any]:
    previous = config.get("prevResult")
    if previous is None:
        raise CniError(
            protocol.ERR_INVALID_CONFIG,
            "prevResult is missing: this plugin must be chained behind one that makes the interface",
        )
    if not isinstance(previous, dict):
        raise _invalid("prevResult", previous, "not an object")
    return previous


def _addresses(previous: dict[str, Any], ifname: str) -> list[str]:
    """Addresses of the pod's interface without prefix length, both families, in order."""
    interfaces = _objects(previous, "interfaces")
    names = [item.get("name") for item in interfaces if item.get("sandbox")]
    if interfaces and ifname not in names:
        raise CniError(
            protocol.ERR_INVALID_ENVIRONMENT,
            f"CNI_IFNAME: prevResult has no interface {ifname} in the pod",
            f"it has {names}",
        )
    addresses = []
    for index, item in enumerate(_objects(previous, "ips")):
        address = item.get("address")
        if not isinstance(address, str):
            raise _invalid(f"prevResult.ips[{index}].address", address, "not a string")
        at = item.get("interface")
        if at is not None:
            if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < len(interfaces):
                raise _invalid(
                    f"prevResult.ips[{index}].interface", at, "not an index of prevResult.interfaces"
                )
            if interfaces[at].get("name") != ifname:
                continue
        addresses.append(address.partition("/")[0])
    return addresses


def _objects(previous: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = previous.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _invalid(f"prevResult.{key}", value, "not a list of objects")
    return value


def _open_netns(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CniError(protocol.ERR_UNKNOWN_CONTAINER, f"CNI_NETNS: {path} does not exist") from None
    except OSError as error:
        raise CniError(protocol.ERR_INVALID_ENVIRONMENT, f"CNI_NETNS: {path}: {error.strerror}") from None
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError:
        kind = 0
    if kind != _CLONE_NEWNET:
        os.close(fd)
        raise CniError(protocol.ERR_INVALID_ENVIRONMENT, f"CNI_NETNS: {path} is no network namespace")
    return fd


def _check_container_id(text: str) -> None:
    if text[0] not in _ID_FIRST or not _ID_REST.issuperset(text):
        raise CniError(
            protocol.ERR_INVALID_ENVIRONMENT,
            f"CNI_CONTAINERID: {text!r} is no container id",
            "a letter or digit, then letters, digits, underscore, dot or hyphen",
        )


def _check_ifname(text: str) -> None:
    if text in (".", "..") or len(os.fsencode(text)) > 15 or any(c in "/:" or c.isspace() for c in text):
        raise CniError(
            protocol.ERR_INVALID_ENVIRONMENT, f"CNI_IFNAME: {text!r} cannot be an interface's name"
        )


def _arguments(text: str) -> dict[str, str]:
    arguments = {}
    for pair in text.split(";"):
        if not pair:
            continue
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise CniError(protocol.ERR_INVALID_ENVIRONMENT, f"CNI_ARGS: {pair!r} is no KEY=VALUE pair")
        arguments[key] = value
    return arguments


def _text(config: dict[str, Any], key: str, default: str) -> str:
    value = config.get(key, default)
    if not isinstance(value, str) or not value:
        raise _invalid(key, value, "not a string, or empty")
    return value


def _invalid(key: str, value: object, reason: str) -> CniError:
    return CniError(protocol.ERR_INVALID_CONFIG, f"{key}: {reason}", f"{key} is {value!r}")


def _error(version: str, error: CniError) -> dict[str, Any]:
    result: dict[str, Any] = {"cniVersion": version, "code": error.code, "msg": error.message}
    if error.details:
        result["details"] = error.details
    return result


def main() -> NoReturn:
    status, output = run(dict(os.environ), 0)
    if output is not None:
        sys.stdout.write(fastjson.dumps(output) + "\n")
        sys.stdout.flush()
    raise SystemExit(status)


if __name__ == "__main__":
    main()
