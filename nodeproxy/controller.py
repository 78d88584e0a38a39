"""The controller's client: the workload/policy stream and certificate signing, over gRPC.

Owns the channel and one thread that reads the stream; gRPC has more of its own. What arrives is posted to the data loop, so
that nothing but this module ever waits for the network. When the controller is away it is tried again for ever; the last
good state stays with those who hold it.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec

from common import logs
from common.channels import CLIENT_OPTIONS
from controlplane.api import (
    METHOD_SIGN,
    METHOD_SUBSCRIBE,
    Ack,
    ClientMessage,
    Hello,
    Nack,
    ResourceError,
    SignRequest,
    SignResponse,
    Update,
    decode_sign_response,
    decode_update,
    encode,
)

_log = logs.get(__name__)

#: Seconds between attempts to reach the controller.
_RETRY_FIRST, _RETRY_MOST = 0.2, 5.0
_SIGN_TIMEOUT = 10.0
#: A snapshot is one message.
_MAX_MESSAGE = 256 * 1024 * 1024

_OPTIONS = [
    # Attempts come one after the other here, each longer than the one before. The first word on an option counts.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    *CLIENT_OPTIONS,
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
]

Post = Callable[[Callable[[], None]], None]


class Controller:
    def __init__(
        self,
        address: str,
        *,
        roots: Path,
        credential: Path,
        admin: str,
        post: Post,
        on_update: Callable[[Update], tuple[ResourceError, ...]],
        version: Callable[[], str],
    ) -> None:
        """:meth:`start` connects.

        :param roots: PEM file; the controller's TLS certificate has to chain to one of them. Read again when a stream ends.
        :param credential: file with the node's token; read for each call, since kubelet replaces it hourly.
        :param post: calls back on the data loop's thread; ``on_update`` and ``version`` run there.
        """
        self._address = address
        self._roots = roots
        self._credential = credential
        self._admin = admin
        self._post = post
        self._on_update = on_update
        self._version = version
        self._stopped = threading.Event()
        self.connected = False
        self._trusted = b""  #: what the channel was made with
        self._channel: grpc.Channel | None = None
        self._subscribe: Any = None
        self._sign: Any = None
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)

    def start(self) -> None:
        # Before the thread, so that certificates can be asked for at once; what is wrong the thread tells.
        with contextlib.suppress(OSError, ValueError):
            self._connect()
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._call is not None:
            self._call.cancel()
        self._thread.join(timeout=5)
        if self._channel is not None:
            self._channel.close()

    def _connect(self) -> None:
        """Make the channel, anew when the roots have changed.

        :raises OSError: they cannot be read.
        :raises ValueError: there are none.
        """
        roots = self._roots.read_bytes()
        if not roots.strip():
            raise ValueError(f"{self._roots} is empty")
        if roots == self._trusted:
            return
        if self._channel is not None:
            self._channel.close()
        channel = grpc.secure_channel(self._address, grpc.ssl_channel_credentials(roots), _OPTIONS)
        self._subscribe = channel.stream_stream(
            METHOD_SUBSCRIBE, request_serializer=encode, response_deserializer=decode_update
        )
        self._sign = channel.unary_unary(
            METHOD_SIGN, request_serializer=encode, response_deserializer=decode_sign_response
        )
        self._channel, self._trusted = channel, roots

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        """:raises OSError: the credential cannot be read."""
        return (("authorization", f"Bearer {self._credential.read_text().strip()}"),)

    # --- certificates ---------------------------------------------------------------------------------------------

    def sign(self, request: SignRequest, done: Callable[[SignResponse | str], None]) -> None:
        """Ask for a certificate; ``done`` gets it on the loop's thread, or in words why not."""
        try:
            if self._sign is None:
                raise ValueError("no connection to the controller yet")
            future = self._sign.future(request, timeout=_SIGN_TIMEOUT, metadata=self._metadata())
        except (ValueError, OSError) as error:  # the channel is closed, or the credential not there
            reason = str(error)
            self._post(lambda: done(reason))
            return

        def finished(call: Any) -> None:
            result: SignResponse | str
            try:
                result = call.result()
            except grpc.RpcError as error:
                result = f"{error.code().name}: {error.details()}"
            except grpc.FutureCancelledError:
                result = "cancelled"
            except msgspec.DecodeError as error:
                result = f"answer not understood: {error}"
            self._post(lambda: done(result))

        future.add_done_callback(finished)

    # --- stream -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        delay = _RETRY_FIRST
        while not self._stopped.is_set():
            try:
                self._connect()
                if self._stream():
                    delay = _RETRY_FIRST
            except grpc.RpcError as error:
                if not self._stopped.is_set():
                    _log.warning("controller stream ended", code=error.code().name, reason=error.details())
            except (msgspec.DecodeError, ValueError) as error:
                _log.error("controller stream not understood", reason=str(error))
            except OSError as error:
                _log.error("roots or credential cannot be read", reason=str(error))
            self.connected = False
            self._stopped.wait(delay * random.uniform(0.8, 1.2))
            delay = min(delay * 2, _RETRY_MOST)

    def _stream(self) -> bool:
        """One stream until it ends; whether anything was received."""
        outgoing: queue.SimpleQueue[ClientMessage | None] = queue.SimpleQueue()
        outgoing.put(Hello("nodeproxy", version=self._version(), admin=self._admin))

        def messages() -> Iterator[ClientMessage]:
            while (message := outgoing.get()) is not None:
                yield message

        received = False
        self._call = self._subscribe(messages(), metadata=self._metadata())
        try:
            update: Update
            for update in self._call:
                received = True
                if not self.connected:
                    self.connected = True
                    _log.info("controller stream open", version=update.version[:12])
                self._post(functools.partial(self._apply, update, outgoing))
        finally:
            outgoing.put(None)
        return received

    def _apply(self, update: Update, outgoing: queue.SimpleQueue[ClientMessage | None]) -> None:
        """On the loop's thread."""
        errors = self._on_update(update)
        for error in errors:
            _log.error("resource refused", key=error.key, reason=error.reason)
        outgoing.put(
            Nack(update.nonce, update.version, errors) if errors else Ack(update.nonce, update.version)
        )
