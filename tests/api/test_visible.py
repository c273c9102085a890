"""No control character survives, whatever the text; and what a process logs is one line a record."""

from __future__ import annotations

import io
import logging
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_api.visible import LOG_MOST, guard_logs, one_line, visible, visible_values

HOSTILE = "\x1b]52;c;cm0gLXJm\x07 \x1b[2J\x9b31m \x1b]0;title\x1b\\ \u202eevil\u2066 \r\n\x00\x7f\u2028\ud800"
BIDI = {"ALM", "LRM", "RLM"}
TEXTS = st.text(st.characters(codec=None)) | st.text(alphabet=HOSTILE)


def acts(character: str) -> bool:
    """Whether Unicode calls it a control character, a surrogate, a separator of lines or one of bidi."""
    direction = unicodedata.bidirectional(character)
    overrides = direction in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    marks = character in "\u061c\u200e\u200f"
    return unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} or overrides or marks


@given(TEXTS)
def test_no_character_that_acts_survives(text):
    assert not any(acts(c) for c in visible(text) if c not in "\n\t")
    assert not any(acts(c) for c in one_line(text))
    visible(text).encode()


@given(TEXTS)
def test_twice_is_once(text):
    assert visible(visible(text)) == visible(text)
    assert one_line(one_line(text)) == one_line(text)
    assert one_line(one_line(text, 9), 9) == one_line(text, 9)


@given(TEXTS, st.integers(1, 40))
def test_the_bound_holds_and_costs_nothing_where_it_is_not_reached(text, most):
    assert len(visible(text, most)) <= most
    assert len(one_line(text, most)) <= most
    if len(visible(text)) <= most:
        assert visible(text, most) == visible(text)
    else:
        assert visible(text, most).endswith("…")


@given(st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"])))
def test_ordinary_text_stays_as_it_is(text):
    assert visible(text) == text


@given(st.lists(st.text(TEXTS.map(lambda text: text[:1] or "x"), min_size=1), min_size=1))
def test_pieces_of_a_stream_give_what_the_whole_would(pieces):
    assert "".join(map(visible, pieces)) == visible("".join(pieces))


def test_what_is_shown_can_be_read():
    assert visible("a\x1b[31mb\n\tc\x9b\u202e") == "a\\x1b[31mb\n\tc\\x9b\\u202e"
    assert one_line("a\r\nb\tc") == "a  b c"
    assert visible("x" * 10, 4) == "xxx…"
    assert visible_values({"a\x07": [1, None, "\x1b"]}) == {"a\\x07": [1, None, "\\x1b"]}


@pytest.fixture
def log():
    """Whatever is logged, as a handler with an ordinary formatter writes it."""
    before = logging.getLogRecordFactory()
    guard_logs()
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("tests.visible")
    logger.addHandler(handler)
    logger.propagate = False
    yield logger, out
    logger.removeHandler(handler)
    logging.setLogRecordFactory(before)


def test_a_record_is_one_line_however_long_its_arguments_are(log):
    logger, out = log
    logger.warning("the worker said %s", "x\nERROR forged\x1b[2J" + "y" * 10**6)
    (line,) = out.getvalue().splitlines()
    assert line.startswith("WARNING the worker said x ERROR forged\\x1b[2J")
    assert len(line) <= LOG_MOST + len("WARNING ")


def test_an_exception_forges_no_record(log):
    logger, out = log
    try:
        raise ValueError("x\nERROR forged\x1b[2J")
    except ValueError:
        logger.exception("it failed")
    first, *others = out.getvalue().splitlines()
    assert first == "ERROR it failed"
    assert others[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") and "\x1b" not in line for line in others)
