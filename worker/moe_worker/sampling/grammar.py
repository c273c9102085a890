"""Output formats as grammars of llguidance, and what one grammar may cost.

llguidance (https://github.com/guidance-ai/llguidance, MIT, in Rust) computes the mask of tokens that may come
next, with an Earley parser over derivatives of regular expressions and a trie of the vocabulary. It compiles
a schema in milliseconds where others build automata first, and it bounds the work of each mask.
"""

import json
import math
import time
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, cast

from moe_worker.sampling.output_format import OutputFormat, TaggedValues
from moe_worker.sampling.parameters import SamplingParameters, Violation

if TYPE_CHECKING:
    from llguidance import LLParserLimits, TokenizerWrapper

COMPILE_CPU_S: Final = 0.25
"""CPU time for compiling one format; a schema with 800 constrained properties takes 0.05 s."""
TOO_SLOW: Final = f"takes more than {COMPILE_CPU_S:g} s to compile; use fewer alternatives"
NOT_INSTALLED: Final = "needs llguidance, which is not installed in this worker; install moe-operator[worker]"
_SHOWN: Final = 300
_BYTES: Final = 256
_DIGITS_SHOWN: Final = 40
_FIXED: Final = ("const", "enum")
_REASON: Final = "error: "
_NO_TEXT: Final = "NoExtensionBias"
"""What llguidance says of a grammar that allows no first token."""
_JSON: Final[Any] = {"whitespace_pattern": r"[ \t\r\n]{1,20}"}
"""Models that are unsure write white space for ever where it is not bounded."""


class FormatError(ValueError):
    """Why there is no grammar of a format."""


@dataclass(frozen=True)
class Verdict:
    """Why a format cannot be used; "": it can."""

    problem: str


def available() -> bool:
    """Whether llguidance is installed."""
    return find_spec("llguidance") is not None


def limits() -> "LLParserLimits":
    """Bounds of the work and the memory of one text; beyond them the text fails alone."""
    from llguidance import LLParserLimits  # noqa: PLC0415 - optional

    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=50_000,
        step_max_items=10_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def grammar_of(output_format: OutputFormat) -> str:
    """The grammar of a format.

    Raises:
        FormatError: a schema is not JSON, or an expression is incomplete.
        ValueError: llguidance refuses the format.
    """
    from llguidance import LLMatcher  # noqa: PLC0415 - optional

    match output_format.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON)
        case "json_schema":
            schema = _schema(output_format.text)
            if not isinstance(schema, dict):
                raise FormatError("is not a JSON object; send a JSON Schema")
            # As text, because llguidance takes no integer of more than 64 bits from Python.
            return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON)
        case "regex":
            return LLMatcher.grammar_from_regex(_expression(output_format.text))
        case "tagged":
            return LLMatcher.grammar_from_lark(_lark(output_format.tagged or TaggedValues(())))


def _schema(text: str) -> Any:
    """The schema in a text.

    llguidance holds numbers as floats: it would take null for those that JSON or a float does not have, and
    a text would get another integer than that of `const` or `enum`. So these are refused.

    Raises:
        FormatError: it is not JSON, or has such a number.
    """
    try:
        return json.loads(
            text, parse_constant=_no_number, parse_float=_finite, parse_int=_integer, object_hook=_exact
        )
    except FormatError:
        raise
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:
        problem = _short(error)
    raise FormatError(f"is not valid JSON: {problem}; send a JSON Schema")


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:_DIGITS_SHOWN]} is too large for a number")
    return value


def _integer(digits: str) -> int:
    _finite(digits)
    return int(digits)


def _exact(found: dict[str, Any]) -> dict[str, Any]:
    for key in _FIXED:
        _check_exact(found.get(key), key)
    return found


def _check_exact(value: Any, key: str) -> None:
    """Objects are not looked into: they may be the schema of a property of that name."""
    if isinstance(value, list):
        for part in value:
            _check_exact(part, key)
    elif isinstance(value, int) and (written := int(Decimal(repr(float(value))))) != value:
        raise FormatError(
            f"has {str(value)[:_DIGITS_SHOWN]} in {key}, which would be written as "
            f"{str(written)[:_DIGITS_SHOWN]}; use a string for such a number"
        )


def _expression(text: str) -> str:
    r"""The expression as llguidance can take it, between slashes.

    `//` would be a comment, and it ignores a `\` at the end.

    Raises:
        FormatError: the last character escapes one that is missing.
    """
    if (len(text) - len(text.rstrip("\\"))) % 2:
        raise FormatError("ends with a backslash that escapes nothing; write it twice, or leave it out")
    return text or "(?:)"


def _lark(tagged: TaggedValues) -> str:
    """Tagged values in llguidance's dialect of Lark, in which `%json` is followed by a schema."""
    more = "" if tagged.single else f"({_literal(tagged.between)} value)*"
    rules = [
        "%llguidance {}",
        f"start: {_literal(tagged.before)} value {more} {_literal(tagged.behind)}",
        "value: " + " | ".join(f"tag_{number}" for number in range(len(tagged.tags))),
    ]
    for number, tag in enumerate(tagged.tags):
        schema = _schema(tag.schema)
        options = schema | {"x-guidance": _JSON} if isinstance(schema, dict) else schema
        value = f"%json {json.dumps(options)}"
        rules.append(f"tag_{number}: {_literal(tag.begin)} {value} {_literal(tag.end)}")
    return "\n".join(rules)


def _literal(text: str) -> str:
    return json.dumps(text) if text else ""


def check(output_format: OutputFormat) -> Verdict:
    """Compiles a format and computes its first mask, over a vocabulary of bytes.

    Untrusted formats can take minutes and gigabytes: for a process that can be killed.
    """
    from llguidance import LLMatcher, LLTokenizer  # noqa: PLC0415 - optional

    tokenizer = LLTokenizer(cast("TokenizerWrapper", _Bytes()))
    began = time.process_time()
    try:
        grammar = grammar_of(output_format)
    except FormatError as error:
        return Verdict(str(error))
    except ValueError as error:
        return Verdict(_unsupported(error))
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        return Verdict(_unsupported(matcher.get_error()))
    return Verdict(TOO_SLOW if time.process_time() - began > COMPILE_CPU_S else "")


def format_violations(
    output_format: OutputFormat, sampling: SamplingParameters, ends: frozenset[int]
) -> list[Violation]:
    """Everything that is wrong with a trusted format; compiles it."""
    if not available():
        return [Violation("output_format", NOT_INSTALLED)]
    found = list(output_format.violations(sampling, ends))
    problem = "" if found else check(output_format).problem
    return [*found, *([Violation(f"output_format.{output_format.kind}", problem)] if problem else [])]


class _Bytes:
    """A vocabulary of single bytes and an end-of-text token, as llguidance's TokenizerWrapper."""

    is_tokenizer_wrapper = True
    eos_token_id = _BYTES
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(_BYTES)), b"")
    special_token_ids = (_BYTES,)

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def _unsupported(problem: object) -> str:
    return f"is not supported: {_short(problem)}; change or leave out that part"


def _short(problem: object) -> str:
    """The first line of what llguidance says; where that only announces a reason, the reason behind it."""
    first, *more = str(problem).strip().splitlines() or ["no reason given"]
    if first == _NO_TEXT:
        return "no text satisfies it"
    reason = next((line for line in more if line.startswith(_REASON)), "")
    return f"{first} {reason.removeprefix(_REASON)}"[:_SHOWN].rstrip(". ")
