"""What a program logs, to stderr: a plain line an event, or a JSON object a line for those who collect logs."""

import json
import logging
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

TEXT, JSON = "text", "json"
LINE = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"

log = logging.getLogger("fedmq")


class JsonLines(logging.Formatter):
    """One object a line.

    ts (RFC 3339, UTC), level, logger, message, what is known of the program, exit_code where it ends, exc_info as text.

    Args:
        known: job and client, where a program has them.
    """

    def __init__(self, known: Mapping[str, str]) -> None:
        super().__init__()
        self._known = dict(known)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of an event."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "ts": at.replace("+00:00", "Z"), "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(),
        } | self._known  # fmt: skip
        if (code := getattr(record, "exit_code", None)) is not None:
            line["exit_code"] = code
        if record.exc_info and record.exc_info[0] is not None:
            line["exc_info"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(level: str, log_format: str = TEXT, **known: str) -> None:
    """Log to stderr; pika's own chatter stays out.

    Args:
        level: debug, info, warning or error.
        log_format: `text` or `json`; with `json` a crash is an event too.
        known: job and client, for each JSON object.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(known) if log_format == JSON else logging.Formatter(LINE))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    logging.captureWarnings(log_format == JSON)
    if log_format == JSON:
        sys.excepthook = _crashed
        threading.excepthook = lambda thread: _crashed(thread.exc_type, thread.exc_value, thread.exc_traceback)


def is_json() -> bool:
    """Tell whether the log is JSON: then nothing else may be written to stderr."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def _crashed(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    exc_info: Any = (kind, error, trace)
    log.critical("%s: %s", kind.__name__, error, exc_info=exc_info)
