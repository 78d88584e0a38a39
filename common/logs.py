"""Structured logs: one event, its fields as keywords, written as text or JSON lines.

Owns the two formats, the loggers' levels (changeable while the process runs) and the command-line flags for both. An
event is a short constant text and what varies goes into fields, so that logs can be searched by event. It decides no
destination: everything goes to standard error, which the container runtime or systemd keeps.

    log = logs.get(__name__)
    log.info("connection accepted", peer=address, workload=uid)
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from datetime import UTC, datetime
from enum import Enum
from typing import Final, Self, TextIO

#: From quiet to talkative. ``error``: somebody has to act. ``warning``: something was refused or given up that should
#: not have been. ``info``: the process's own life and rare changes. ``debug``: per connection or request.
LEVELS: Final = {
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}
_NAMES: Final = {number: name for name, number in LEVELS.items()}


class Format(Enum):
    """How a line looks."""

    TEXT = "text"
    JSON = "json"


class LevelError(ValueError):
    """A level specification that names no level."""


class Logger:
    """A named logger whose methods take an event and its fields.

    A call below the level costs one dictionary look-up; do not compute expensive fields without asking
    :meth:`enabled` first.
    """

    __slots__ = ("_fields", "_logger")

    def __init__(self, logger: logging.Logger, fields: dict[str, object] | None = None) -> None:
        self._logger = logger
        self._fields = fields or {}

    def bind(self, **fields: object) -> Self:
        """The same logger with ``fields`` on every line: for what lives as long as a connection."""
        return type(self)(self._logger, {**self._fields, **fields})

    def enabled(self, level: str) -> bool:
        """Whether a line of that level would be written."""
        return self._logger.isEnabledFor(LEVELS[level])

    def debug(self, event: str, /, **fields: object) -> None:
        if self._logger.isEnabledFor(logging.DEBUG):
            self._write(logging.DEBUG, event, fields, None)

    def info(self, event: str, /, **fields: object) -> None:
        if self._logger.isEnabledFor(logging.INFO):
            self._write(logging.INFO, event, fields, None)

    def warning(self, event: str, /, **fields: object) -> None:
        if self._logger.isEnabledFor(logging.WARNING):
            self._write(logging.WARNING, event, fields, None)

    def error(self, event: str, /, **fields: object) -> None:
        if self._logger.isEnabledFor(logging.ERROR):
            self._write(logging.ERROR, event, fields, None)

    def exception(self, event: str, error: BaseException | None = None, /, **fields: object) -> None:
        """An error with its traceback: ``error``, or the exception being handled."""
        if self._logger.isEnabledFor(logging.ERROR):
            self._write(logging.ERROR, event, fields, error or sys.exc_info()[1])

    def _write(self, level: int, event: str, fields: dict[str, object], error: BaseException | None) -> None:
        exc_info = (type(error), error, error.__traceback__) if error is not None else None
        # Straight to makeRecord: the caller's file and line, which nobody reads here, cost more than all the rest.
        record = self._logger.makeRecord(self._logger.name, level, "", 0, event, (), exc_info)
        record.fields = {**self._fields, **fields} if self._fields else fields
        self._logger.handle(record)


def get(name: str) -> Logger:
    """The logger of a module: ``logs.get(__name__)``."""
    return Logger(logging.getLogger(name))


def setup(level: str = "info", format: Format | str = Format.TEXT, stream: TextIO | None = None) -> None:
    """Write logs to ``stream`` (standard error) from now on. A second call replaces the first.

    :raises LevelError: see :func:`set_levels`.
    """
    handler = _Handler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_JsonFormatter() if Format(format) is Format.JSON else _TextFormatter())
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    set_levels(level)


def set_levels(specification: str) -> None:
    """Set levels at run time.

    ``debug`` is for all, ``agent.cni:debug`` for one logger and those below it; several have commas between.

    :raises LevelError: a level is not one of :data:`LEVELS`; nothing has changed then.
    """
    changes: dict[str, int] = {}
    for part in specification.split(","):
        name, _, level = part.strip().rpartition(":")
        number = LEVELS.get(level.lower())
        if number is None:
            raise LevelError(f"no log level {level!r}: one of {', '.join(LEVELS)}")
        changes[name] = number
    for name, number in changes.items():
        # The root logger's own name would make a child called "root".
        logging.getLogger(name or None).setLevel(number)


def levels() -> dict[str, str]:
    """Every level that was set, by logger; the empty name is what all others have."""
    result = {"": _level_name(logging.getLogger().level)}
    for name, logger in sorted(logging.Logger.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET:
            result[name] = _level_name(logger.level)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--log-level`` and ``--log-format``, by default what ``MYCEL_LOG_LEVEL`` and ``MYCEL_LOG_FORMAT`` say."""
    parser.add_argument(
        "--log-level",
        default=os.environ.get("MYCEL_LOG_LEVEL", "info"),
        help="error, warning, info or debug; single loggers as in info,agent.cni:debug",
    )
    parser.add_argument(
        "--log-format",
        choices=[format.value for format in Format],
        default=os.environ.get("MYCEL_LOG_FORMAT", Format.TEXT.value),
    )


def setup_from(arguments: argparse.Namespace) -> None:
    """:func:`setup` with what :func:`add_arguments` parsed."""
    setup(arguments.log_level, arguments.log_format)


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that a second setup() replaces it and leaves others' handlers (pytest's) alone."""


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": _level_name(record.levelno),
            "logger": record.name,
            "event": record.getMessage(),
        }
        # A field never hides what the line itself says.
        fields = {
            name if name not in line else f"field_{name}": value for name, value in _fields(record).items()
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps({**line, **fields}, default=str, ensure_ascii=False)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_text(value)}" for name, value in _fields(record).items())
        event = _printable(record.getMessage())
        line = f"{_time(record)} {_level_name(record.levelno):<7} {record.name} {event}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Ours have them; a library's record has none."""
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, dict) else {}


def _time(record: logging.LogRecord) -> str:
    """RFC 3339, UTC, microseconds."""
    return datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _level_name(number: int) -> str:
    return _NAMES.get(number) or logging.getLevelName(number).lower()


def _text(value: object) -> str:
    """A value that cannot be mistaken for two fields, or for a line of its own: what a peer sent may be in it."""
    text = str(value)
    if text and text.isprintable() and not any(character in ' "=' for character in text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _printable(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]
