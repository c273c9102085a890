"""How the next token is chosen, and which choices are allowed. No torch: the RPC edge checks with this."""

import math
from dataclasses import dataclass

MAX_TEMPERATURE = 2.0
MAX_STOPS = 16
MAX_STOP_BYTES = 256


@dataclass(frozen=True)
class Violation:
    """What is wrong with one field; `description` reads on from its name ("is 3; use a number in (0, 1]")."""

    field: str
    description: str


@dataclass(frozen=True)
class SamplingParameters:
    """Choices for one request.

    max_tokens: tokens to generate at most; the context length also ends a text.
    temperature: 0 takes the likeliest token; above 0 divides the logits.
    top_p: keeps the smallest set of tokens whose probability reaches this (after top_k).
    top_k: keeps this many of the likeliest tokens; 0 keeps all.
    seed: makes sampling repeatable, in any batch; None: a fresh one.
    stop: generation ends before the first of these texts.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def violations(self) -> list[Violation]:
        """Every field that is out of range."""
        checks = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more"),
            (
                "temperature",
                self.temperature,
                0 <= self.temperature <= MAX_TEMPERATURE,
                f"0 to {MAX_TEMPERATURE:g}",
            ),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0, 1 at most"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**64, "0 to 2^64 - 1"),
        )
        found = [
            Violation(name, f"is {_shown(value)}; use {allowed}")
            for name, value, right, allowed in checks
            if not right
        ]
        return found + self._stop_violations()

    def _stop_violations(self) -> list[Violation]:
        found = []
        if len(self.stop) > MAX_STOPS:
            found.append(Violation("stop", f"holds {len(self.stop)} texts; use {MAX_STOPS} at most"))
        for index, text in enumerate(self.stop):
            size = len(text.encode(errors="surrogatepass"))
            if not 1 <= size <= MAX_STOP_BYTES:
                found.append(Violation(f"stop[{index}]", f"takes {size} bytes; use 1 to {MAX_STOP_BYTES}"))
        return found


def _shown(value: float | None) -> str:
    return (
        "not a number"
        if isinstance(value, float) and math.isnan(value)
        else f"{value:.6g}"
        if isinstance(value, float)
        else str(value)
    )


_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) for token `index` of the request with `seed`.

    SplitMix64 (Steele, Lea and Flood 2014) as a function of both, so that a text continues alike after its
    request was moved, preempted or batched with others.
    """
    return (_mix((_mix(seed) + (index + 1) * _GOLDEN) & _MASK) >> 11) / 2**53


def _mix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
