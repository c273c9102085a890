"""Log-probabilities as they leave the engine. No torch: the RPC edge speaks in these too."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprobs:
    """What the model thought of one token (natural logarithms, before bias, penalties and temperature).

    logprob: of the token that was chosen.
    top: the likeliest tokens and theirs, likeliest first; as many as were asked for.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
