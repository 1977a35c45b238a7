"""Log records as lines, of text or JSON; and lines that tell one unit of work in fields.

    2026-01-31 12:00:00,123 INFO kvindexer.store.writing shard written source=tcp://pod:5557 records=512
    {"ts": "2026-01-31T12:00:00.123Z", "level": "info", "logger": "kvindexer.store.writing",
     "message": "shard written", "source": "tcp://pod:5557", "records": 512}                       (as one line)

Invariant: a record can't pass for two, whatever names are in it; and of an exception only its type and its place are
written, since its text could quote a prompt, tokens or a secret.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from asyncio import AbstractEventLoop
from collections.abc import Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final

from kvindexer.settings.serving import LogLevel
from kvindexer.settings.watching import Watching

OURS: Final = "kvindexer"
FIXED: Final = ("ts", "level", "logger", "message")
"""Fields of every record in JSON; those of a unit of work stand beside them."""
MAX_CAUSES: Final = 8

_FIELDS: Final = "kvindexer_fields"
_CONTROL: Final = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_BARE: Final = re.compile(r"[^\s\"=\\]+")
_ARGUMENTS: Final = re.compile(r"[<(]")
_LIBRARIES: Final = {"uvicorn": logging.INFO}
"""Other people's loggers and their least level, WARNING if not here: at `debug` some show headers and bodies."""

_log = logging.getLogger(__name__)

Field = str | int | float | bool | None


def tell(logger: logging.Logger, level: int, event: str, **fields: Field) -> None:
    """Log one unit of work; fields that are None are left away, and none may have a name of `FIXED`."""
    if logger.isEnabledFor(level):
        known = {name: value for name, value in fields.items() if value is not None}
        logger.log(level, event, extra={_FIELDS: known})


def set_up(settings: Watching, level: LogLevel) -> None:
    """Write records to standard error from now on, in the form that was chosen."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextLines())
    root = logging.getLogger()
    for present in root.handlers[:]:
        root.removeHandler(present)
    root.addHandler(handler)
    set_level(level)


def set_level(level: LogLevel) -> None:
    """Choose the least important of our records that are written; libraries say what goes wrong, and no more."""
    chosen = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger().setLevel(max(chosen, logging.WARNING))
    logging.getLogger(OURS).setLevel(chosen)
    for name, least in _LIBRARIES.items():
        logging.getLogger(name).setLevel(max(chosen, least))


def loop_fault(_loop: AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handler of an event loop: what nobody waits for has failed.

    Of asyncio's sentence only the beginning is taken: behind it may stand what a callback was called with.
    """
    said = _ARGUMENTS.split(context.get("message", "a fault in the event loop"), maxsplit=1)[0].strip()
    _log.error("%s", said, exc_info=context.get("exception"))


class TextLines(logging.Formatter):
    """A record as a line for eyes; its further lines, if any, are indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """All of it; what another handler has made of an exception is not taken over."""
        record.exc_text = None
        try:
            return super().format(record)
        finally:
            record.exc_text = None

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The message and its fields."""
        fields = getattr(record, _FIELDS, None)
        if fields:
            told = " ".join(f"{name}={_bare(value)}" for name, value in fields.items())
            record.message = f"{record.message} {told}"
        return _CONTROL.sub(_escaped, super().formatMessage(record)).replace("\n", "\n    ")

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """Types and places, without the exceptions' own texts."""
        _, error, place = ei
        return "    " + "\n".join(_stack(error, place)).replace("\n", "\n    ")

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - logging's name
        """The place, indented."""
        return "    " + stack_info.replace("\n", "\n    ")


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """All of it; what a library hands over and can't be JSON is shown as text."""
        told: dict[str, object] = {
            "ts": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in (getattr(record, _FIELDS, None) or {}).items():
            told.setdefault(name, value)
        if record.exc_info and record.exc_info[1] is not None:
            _, error, place = record.exc_info
            told["error"] = type(error).__name__
            told["stack"] = "\n".join(_stack(error, place))
        return json.dumps(told, default=str)


def _utc(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _bare(value: Field) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def _stack(error: BaseException | None, place: TracebackType | None) -> Iterator[str]:
    """Where an exception and those that it came of were raised, outermost first; what they are, not what they say."""
    for _ in range(MAX_CAUSES):
        if error is None:
            return
        yield from (line.rstrip() for line in traceback.format_tb(place))
        yield type(error).__name__
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        place = error.__traceback__ if error is not None else None
