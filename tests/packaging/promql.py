"""The names and labels in a PromQL expression: enough of its grammar to check that they are exported."""

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""(?P<string>"(?:[^"\\]|\\.)*")
    |(?P<range>\[[^\]"]*\])
    |(?P<duration>\d+(?:ms|[smhdwy])\b|(?<=offset\ )\$__(?:range|rate_interval)\b)
    |(?P<number>\d+(?:\.\d+)?(?:e[+-]?\d+)?)
    |(?P<word>[a-zA-Z_:][a-zA-Z0-9_:]*)
    |(?P<operator>=~|!~|!=|==|>=|<=|[-+*/%^<>=])
    |(?P<mark>[(){},@])""",
    re.VERBOSE,
)
_RANGE = re.compile(r"\[(\d+(ms|[smhdwy])|\$__rate_interval|\$__range)\]")
_CLAUSES = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = {"and", "or", "unless", "bool", "offset", *_CLAUSES}
_FUNCTIONS = {
    *("sum", "min", "max", "avg", "count", "rate", "increase", "deriv", "changes", "absent", "vector"),
    *("histogram_quantile", "min_over_time", "label_replace", "time"),
}
_OF_COUNTERS = {"rate", "increase"}
_COUNTERS = ("_total", "_count", "_sum", "_bucket")


class PromqlError(ValueError):
    """The expression cannot be right."""


@dataclass
class Expression:
    """What an expression names.

    names: metrics. matched: labels in matchers, with the metric's name. grouped: labels in `by` and other
    clauses. made: labels that label_replace makes.
    """

    names: set[str] = field(default_factory=set)
    matched: set[tuple[str, str]] = field(default_factory=set)
    grouped: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)


def parse(text: str) -> Expression:
    """Reads an expression. Raises PromqlError for what Prometheus would refuse, as far as it is noticed."""
    tokens = _tokens(text)
    _check_brackets(tokens)
    found, position = Expression(), 0
    while position < len(tokens):
        word, following = tokens[position], tokens[position + 1 : position + 2]
        position += 1
        if not re.match(r"[a-zA-Z_]", word) or (word in _WORDS - _CLAUSES):
            continue
        if word in _CLAUSES:
            inner, position = _inside(tokens, position)
            found.grouped.update(label for label in inner if label != ",")
        elif word in _FUNCTIONS and following and following[0] in {"(", "by", "without"}:
            _check_call(word, tokens[position:], found)
        elif following == ["("]:
            raise PromqlError(f"{word} is not a function that is known here: {text}")
        else:
            position = _selector(word, tokens, position, found)
    return found


def _tokens(text: str) -> list[str]:
    rest = _TOKEN.sub("", text).strip()
    if rest:
        raise PromqlError(f"{rest!r} is not understood: {text}")
    return [match.group() for match in _TOKEN.finditer(text)]


def _check_brackets(tokens: list[str]) -> None:
    opened: list[str] = []
    for token in tokens:
        if token in {"(", "{"}:
            opened.append({"(": ")", "{": "}"}[token])
        elif token in {")", "}"} and (not opened or opened.pop() != token):
            raise PromqlError(f"{token} closes nothing: {' '.join(tokens)}")
        elif token.startswith("[") and not _RANGE.fullmatch(token):
            raise PromqlError(f"{token} is no range")
    if opened:
        raise PromqlError(f"{opened[-1]} is missing: {' '.join(tokens)}")


def _inside(tokens: list[str], position: int) -> tuple[list[str], int]:
    """The tokens in the parentheses that open here, and the position behind them."""
    if tokens[position : position + 1] != ["("]:
        raise PromqlError(f"a list of labels is missing: {' '.join(tokens)}")
    end = tokens.index(")", position)
    return tokens[position + 1 : end], end + 1


def _check_call(function: str, behind: list[str], found: Expression) -> None:
    if function in _OF_COUNTERS and not behind[1].endswith(_COUNTERS):
        raise PromqlError(f"{function} of {behind[1]}, which is no counter")
    if function == "label_replace":
        found.made.add(next(token for token in behind if token.startswith('"'))[1:-1])


def _selector(name: str, tokens: list[str], position: int, found: Expression) -> int:
    found.names.add(name)
    if tokens[position : position + 1] != ["{"]:
        return position
    end = tokens.index("}", position)
    matchers = tokens[position + 1 : end]
    for label, operator, value in zip(matchers[::4], matchers[1::4], matchers[2::4], strict=True):
        if operator not in {"=", "!=", "=~", "!~"} or not value.startswith('"'):
            raise PromqlError(f"{label} {operator} {value} is no matcher of {name}")
        found.matched.add((name, label))
    return end + 1
