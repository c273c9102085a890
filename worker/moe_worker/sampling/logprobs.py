"""Log-probabilities as they leave the engine. No torch: the RPC edge uses them, too."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one token, before bias, penalties and temperature.

    logprob: of the sampled token. top: the most likely tokens and theirs, descending, as many as requested.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
