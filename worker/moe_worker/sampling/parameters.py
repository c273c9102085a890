"""How the next token is chosen, and which choices are allowed. No torch: the RPC edge checks with this."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_TEMPERATURE = 2.0
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIASES = 1024
# What a field may hold at most, of what.
LISTS = {
    "stop": (MAX_STOPS, "texts"),
    "stop_token_ids": (MAX_STOP_TOKENS, "token ids"),
    "logit_bias": (MAX_LOGIT_BIASES, "token ids"),
}
MAX_BIAS = 100.0
# Beyond these a penalty outweighs any logit; within them no finite logit becomes infinite.
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.1, 10.0
MAX_PENALTY = 2.0
MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 2**18
"""Log-probabilities of one prompt: its tokens times (likely ones of each plus 1)."""


@dataclass(frozen=True)
class Violation:
    """A violation in one field; `description` continues its name ("is 3; use a number in (0, 1]").

    too_long: whether it is a text of more tokens than the context has room for.
    """

    field: str
    description: str
    too_long: bool = False


@dataclass(frozen=True)
class SamplingParameters:
    """Sampling parameters of one request. The defaults are greedy, with at most 128 tokens.

    They apply in this order, as in transformers: logit_bias, the penalties, temperature, top_k, top_p over
    what top_k left, min_p.

    max_tokens: most tokens to generate; generation also ends at the context length.
    temperature: 0 is greedy; above 0 divides the logits.
    top_p: keeps the smallest set of tokens whose probability reaches this (Holtzman et al. 2020).
    top_k: keeps this many of the most likely tokens, and ties with the last of them; 0 keeps all.
    seed: makes sampling reproducible in any batch that gives the same logits; None: a random one.
    stop: generation ends before the first of these texts.
    min_p: drops tokens below this share of the largest probability (Nguyen et al. 2024).
    repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or text (Keskar et
        al. 2019); 1 changes nothing.
    presence_penalty: subtracted from the logits of generated tokens; the prompt does not count.
    frequency_penalty: the same, once for each occurrence of the token.
    logit_bias: (token id, value added to its logit) pairs.
    stop_token_ids: generation ends with the first of these tokens, which is not part of the text.
    ignore_eos: continues after the model's end-of-text token.
    min_tokens: end-of-text tokens and stop_token_ids are not sampled before this many tokens; stop texts
        still end the text.
    logprobs: log-probabilities of each sampled token and of this many of the most likely; None: none.
    prompt_logprobs: the same for each token of the prompt.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on previous tokens."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p leave out tokens."""
        return self.top_k > 0 or self.top_p < 1

    def end_tokens(self, model_ends: Iterable[int]) -> frozenset[int]:
        """Tokens that end the text; `model_ends` are the model's end-of-text tokens."""
        return frozenset(self.stop_token_ids).union(() if self.ignore_eos else model_ends)

    def violations(self, vocab_size: int | None = None) -> list[Violation]:
        """Every field that is out of range; token ids are checked where `vocab_size` is given."""
        numbers = [
            Violation(name, f"is {_shown(value)}; use {allowed}")
            for name, value, right, allowed in self._numbers()
            if not right
        ]
        return [
            *numbers,
            *self._stop_violations(),
            *self._token_violations(vocab_size),
            *self._bias_violations(vocab_size),
        ]

    def _numbers(self) -> Iterator[tuple[str, float | None, bool, str]]:
        """(field, value, whether it is valid, what is allowed) for every numeric field."""
        yield "max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more"
        yield _within("temperature", self.temperature, 0, MAX_TEMPERATURE)
        yield "top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0, 1 at most"
        yield "top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"
        yield "seed", self.seed, self.seed is None or 0 <= self.seed < 2**64, "0 to 2^64 - 1"
        yield _within("min_p", self.min_p, 0, 1)
        yield _within(
            "repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        )
        yield _within("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        yield _within("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        most = f"0 to max_tokens, which is {self.max_tokens}"
        yield "min_tokens", self.min_tokens, 0 <= self.min_tokens <= max(self.max_tokens, 0), most
        for name in ("logprobs", "prompt_logprobs"):
            value: int | None = getattr(self, name)
            yield name, value, 0 <= (value or 0) <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"

    def prompt_violations(self, length: int) -> list[Violation]:
        """The problem with scoring a prompt of this many tokens."""
        if self.prompt_logprobs is None:
            return []
        total = length * (self.prompt_logprobs + 1)
        if total <= MAX_PROMPT_LOGPROBS:
            return []
        asked = f"asks for {total} log-probabilities of a prompt of {length} tokens"
        remedy = f"{MAX_PROMPT_LOGPROBS} are the most; ask for fewer, or shorten the prompt"
        return [Violation("prompt_logprobs", f"{asked}; {remedy}")]

    def _stop_violations(self) -> Iterator[Violation]:
        if too_many := list_violation("stop", len(self.stop)):
            yield too_many
            return
        for index, text in enumerate(self.stop):
            size = len(text.encode(errors="surrogatepass"))
            if not 1 <= size <= MAX_STOP_BYTES:
                yield Violation(f"stop[{index}]", f"takes {size} bytes; use 1 to {MAX_STOP_BYTES}")

    def _token_violations(self, vocab_size: int | None) -> Iterator[Violation]:
        if too_many := list_violation("stop_token_ids", len(self.stop_token_ids)):
            yield too_many
            return
        for index, token in enumerate(self.stop_token_ids):
            if _unknown(token, vocab_size):
                yield Violation(f"stop_token_ids[{index}]", _unknown_sentence(token, vocab_size))

    def _bias_violations(self, vocab_size: int | None) -> Iterator[Violation]:
        if too_many := list_violation("logit_bias", len(self.logit_bias)):
            yield too_many
            return
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            yield Violation("logit_bias", "names a token id twice; use each once")
        for token, bias in self.logit_bias:
            if _unknown(token, vocab_size):
                yield Violation(f"logit_bias[{token}]", _unknown_sentence(token, vocab_size))
            elif not -MAX_BIAS <= bias <= MAX_BIAS:
                allowed = f"{-MAX_BIAS:g} to {MAX_BIAS:g}"
                yield Violation(f"logit_bias[{token}]", f"is {_shown(bias)}; use {allowed}")


def list_violation(field: str, length: int) -> Violation | None:
    """The violation of a list with too many elements, found by its length: a cheap check."""
    most, elements = LISTS[field]
    return Violation(field, f"holds {length} {elements}; use {most} at most") if length > most else None


def _within(field: str, value: float, low: float, high: float) -> tuple[str, float, bool, str]:
    return field, value, low <= value <= high, f"{low:g} to {high:g}"


def _unknown(token: int, vocab_size: int | None) -> bool:
    return token < 0 or (vocab_size is not None and token >= vocab_size)


def _unknown_sentence(token: int, vocab_size: int | None) -> str:
    allowed = "0 or more" if vocab_size is None else f"ids from 0 to {vocab_size - 1}"
    return f"means token id {token}, which is unknown; use {allowed}"


def _shown(value: float | None) -> str:
    return (
        "not a number"
        if isinstance(value, float) and math.isnan(value)
        else f"{value:.6g}"
        if isinstance(value, float)
        else str(value)
    )
