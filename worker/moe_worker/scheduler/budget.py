"""Automatic batch size: how many tokens fit into a step of the target duration."""

import math
from dataclasses import dataclass, field

from moe_worker.scheduler.plan import Limits

# Decay of a measurement's weight with each later one: about the last 50 steps count.
MEMORY = 0.98
# The smallest step of so many is remembered, and of as many before them.
RECENT = 50
# A step that takes more than this many times its estimate, and the usual step (a compilation, a machine
# that was suspended), is clipped to that, once there are enough measurements to trust the estimate. None
# is fast by accident: what was measured before a step that takes less than this part of its estimate was
# slowed down, and is forgotten.
SURPRISE = 4.0
TRUSTED = 8
# The slope is fitted while the standard deviation of step sizes is at least this fraction of their mean.
# Steps of one size say nothing about the cost of a token; the slope then stays unchanged.
SPREAD = 0.25


@dataclass
class StepTime:
    """Estimates seconds = fixed + per_token * tokens, by least squares with exponentially fading weights.

    Until steps of several sizes were measured, the time is assumed to be proportional to the tokens, which
    errs towards small steps. The true time is concave in the tokens where they share what is read, such as
    experts: the estimate says too much for steps that are smaller than all measured ones.
    """

    fixed: float = 0.0
    per_token: float = 0.0
    count: int = 0
    _weight: float = 0.0
    _mean_tokens: float = 0.0
    _mean_s: float = 0.0
    _variance: float = 0.0
    _covariance: float = 0.0
    _fitted: bool = False
    _least: float = math.inf
    _least_before: float = math.inf

    @property
    def least(self) -> float:
        """Tokens of the smallest step measured lately; infinite before the first measurement."""
        return min(self._least, self._least_before)

    def estimate(self, tokens: int) -> float:
        """Seconds that a step of `tokens` tokens takes."""
        return self.fixed + self.per_token * tokens

    def within(self, seconds: float) -> float:
        """Tokens of a step that takes `seconds`, with a fraction; infinite before the first measurement."""
        left = max(0.0, seconds - self.fixed)
        return left / self.per_token if self.per_token else math.inf

    @property
    def varied(self) -> bool:
        """Whether the sizes of the steps differ enough to tell the cost of a token from that of a step."""
        return self._variance >= (SPREAD * self._mean_tokens) ** 2

    @property
    def assumed(self) -> bool:
        """Whether time is only assumed to be proportional to tokens: all steps had about one size so far."""
        return self.count > 0 and not self._fitted and not self.fixed

    @property
    def larger(self) -> int:
        """Tokens of a step twice as large as usual."""
        return int(2 * self._mean_tokens)

    def observe(self, tokens: int, seconds: float) -> None:
        """Adds a measured step."""
        if self.count >= TRUSTED:
            seconds = min(seconds, SURPRISE * max(self.estimate(tokens), self._mean_s))
        if seconds < self.estimate(tokens) / SURPRISE:
            self._weight, self._fitted = 0.0, False
        if self.count % RECENT == 0:
            self._least_before, self._least = self._least, math.inf
        self.count += 1
        self._least = min(self._least, tokens)
        self._weight = MEMORY * self._weight + 1.0
        part = 1.0 / self._weight
        off_tokens, off_s = tokens - self._mean_tokens, seconds - self._mean_s
        self._mean_tokens += part * off_tokens
        self._mean_s += part * off_s
        self._variance = (1.0 - part) * (self._variance + part * off_tokens * off_tokens)
        self._covariance = (1.0 - part) * (self._covariance + part * off_tokens * off_s)
        self._fit()

    def _fit(self) -> None:
        if self.varied:
            self._fitted = True
            self.per_token = max(0.0, self._covariance / self._variance)
        elif not self._fitted:
            self.per_token = self._mean_s / self._mean_tokens
        self.fixed = max(0.0, self._mean_s - self.per_token * self._mean_tokens)


@dataclass
class TokenBudget:
    """Tokens of the next step, from measured step times.

    Steps with and without prompts are measured apart: on a GPU they run other kernels, and those with large
    prompts are launched kernel by kernel in 25 ms, whereas the others are captured. One line through both
    would say that tokens are expensive, and keep prompts small where that saves nothing.

    The budget is the number of tokens that the estimate allows in target_s. If the fixed cost of a step
    (reading all weights) alone takes more than half of that, the budget is the number that doubles the fixed
    cost: smaller steps would cost throughput and hardly be shorter. It stays between least_tokens and the
    ceiling. Where not even least_tokens meet target_s, and steps of one size do not tell why, larger prompts
    are tried; not more sequences, which would stay for as long as they run.
    """

    limits: Limits
    decoding: StepTime = field(default_factory=StepTime)
    prompts: StepTime = field(default_factory=StepTime)
    ceiling: int = field(init=False)

    def __post_init__(self) -> None:
        self.ceiling = self.limits.step_tokens

    def time(self, *, prompts: bool) -> StepTime:
        """The estimate for steps with or without prompts; as long as there is none, that of the others."""
        mine, other = (self.prompts, self.decoding) if prompts else (self.decoding, self.prompts)
        return mine if mine.count else other

    def observe(self, tokens: int, sequences: int, seconds: float) -> None:
        """Adds a measured step; more tokens than sequences are those of prompts."""
        (self.prompts if tokens > sequences else self.decoding).observe(tokens, seconds)

    @property
    def sequences(self) -> int:
        """Sequences that may run."""
        return self._tokens(self.time(prompts=False))

    def prompt_tokens(self, decoding: int) -> int:
        """Prompt tokens that the next step may compute in addition to `decoding` streams; at least one.

        If no stream waits, a long step delays nobody, and all of prefill_tokens is allowed.
        """
        most = min(self.limits.prefill_tokens, self.ceiling - decoding)
        time = self.time(prompts=True)
        tokens = self._tokens(time)
        if tokens <= self.limits.least_tokens and not time.varied:
            tokens = max(tokens, time.larger)
        wanted = max(tokens - decoding, self.limits.least_tokens) if decoding else most
        return max(1, min(wanted, most))

    def shrink(self, tokens: int) -> None:
        """Limits later steps to `tokens` tokens (but at least one for each stream, and one more)."""
        self.ceiling = max(1, min(self.ceiling, tokens))

    def _tokens(self, time: StepTime) -> int:
        """Tokens of a step while streams wait for their next token."""
        least = min(self.limits.least_tokens, self.ceiling)
        if not time.count:
            return least
        room_s = max(self.limits.target_s, 2 * time.fixed) - time.fixed
        if room_s >= time.per_token * self.ceiling:
            return self.ceiling
        return min(max(least, int(room_s / time.per_token)), self.ceiling)
