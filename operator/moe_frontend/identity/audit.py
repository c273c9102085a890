"""The audit log: one line of JSON for each request. It says who asked for what kind of thing, and how that
ended.

It never contains prompts, answers, parameters or credentials.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from moe_frontend.identity.caller import current


@dataclass
class Entry:
    """What is known of a running request.

    status: a code of gRPC by name, or of HTTP; "" until it is known.
    prompt_tokens, completion_tokens: that workers computed for it; 0 for what came from a cache of answers.
    """

    protocol: str
    method: str
    request_id: str
    status: str | int = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


_RUNNING: Final[ContextVar[Entry | None]] = ContextVar("moe_frontend_audited", default=None)


def count(prompt_tokens: int, completion_tokens: int) -> None:
    """Adds tokens to the running request, if there is a log."""
    entry = _RUNNING.get()
    if entry is not None:
        entry.prompt_tokens += prompt_tokens
        entry.completion_tokens += completion_tokens


class AuditLog:
    """Writes a line for each request when it ends.

    write: takes a line without its end, and neither waits nor fails (lines.LineWriter); None: there is no
        log.
    """

    def __init__(self, write: Callable[[str], object] | None = None) -> None:
        self._write = write

    @contextlib.contextmanager
    def request(self, protocol: str, method: str, request_id: str = "") -> Iterator[Entry]:
        """One request; set the status before the block ends. Its task serves no other."""
        entry, began = Entry(protocol, method, request_id), time.monotonic()
        if self._write is None:
            yield entry
            return
        _RUNNING.set(entry)
        try:
            yield entry
        finally:
            self._write(_line(entry, time.monotonic() - began))


def _line(entry: Entry, duration_s: float) -> str:
    caller = current()
    fields = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "request_id": entry.request_id,
        "protocol": entry.protocol,
        "method": entry.method,
        "tenant": caller.tenant,
        "caller": caller.name,
        "status": entry.status,
        "prompt_tokens": entry.prompt_tokens,
        "completion_tokens": entry.completion_tokens,
        "duration_s": round(duration_s, 3),
    }
    return json.dumps(fields)


NO_LOG: Final = AuditLog()
