"""Makes characters visible that would otherwise act on a terminal or forge lines of a log.

Texts of models, errors, pods, events and other processes are not trusted. An escape sequence in them could
set the title of a terminal, fill the clipboard (OSC 52) or hide text, a line break could forge a line of a
log, and a bidirectional override could show one text and mean another (CVE-2021-42574). Such characters are
shown as the escapes that Python and JSON write for them, `\\x1b` for ESC.

The functions only add escapes, so applying one twice gives the same result.
"""

from __future__ import annotations

import logging
import re
import traceback
from typing import Any, Final

LOG_MOST: Final = 8192
"""Characters of a message in a log, at most."""
_TRACE_LINES: Final = 200
"""Lines of a traceback in a log, at most; the last ones contain the error."""
_CUT: Final = "…"

# C0 and C1 control characters (without tab and line feed), DEL, Unicode's Bidi_Control characters, its line
# and paragraph separators, and surrogates, which no encoding carries.
_ACTING: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_BREAKS: Final = str.maketrans(dict.fromkeys("\t\n\r\v\f\x85\u2028\u2029", " "))


def visible(text: str, most: int | None = None) -> str:
    """The text without characters that act on a terminal; line feeds and tabs stay.

    most: maximum length of the result; a longer text is cut and ends with an ellipsis.
    """
    # Every character becomes at least one, so the rest cannot appear in the result.
    text = text if most is None else text[: most + 1]
    return _cut(_ACTING.sub(_escape, text), most)


def one_line(text: str, most: int | None = None) -> str:
    """As `visible`, in one line: line breaks and tabs become spaces."""
    text = text if most is None else text[: most + 1]
    return visible(text.translate(_BREAKS), most)


def visible_values(value: Any) -> Any:
    """A JSON value whose texts, keys of objects included, are visible."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible_values(key): visible_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [visible_values(item) for item in value]
    return value


def guard_logs() -> None:
    """Makes every later record of `logging` in this process one visible line of at most LOG_MOST characters.

    Tracebacks keep their lines, indented so that no line can be mistaken for a record.
    """
    logging.setLogRecordFactory(_Record)


class _Record(logging.LogRecord):
    """A record whose texts are visible, whichever handler and formatter write it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.exc_info and self.exc_info[0] is not None:
            lines = "".join(traceback.format_exception(*self.exc_info)).splitlines()[-_TRACE_LINES:]
            self.exc_text = "\n".join(f"  {one_line(line, LOG_MOST)}" for line in lines)

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return one_line(super().getMessage(), LOG_MOST)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _cut(text: str, most: int | None) -> str:
    return text if most is None or len(text) <= most else text[: most - 1] + _CUT
