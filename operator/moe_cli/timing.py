"""Timing of a response. Pure."""

import dataclasses

from moe_api.inference.v1 import inference_pb2

_PREFIX = "FINISH_REASON_"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Figures of a completed response.

    Attributes:
        prompt_tokens: tokens read.
        completion_tokens: tokens generated.
        finish_reason: "stop" or "length"; a number that this version does not know.
        first_s: seconds from the call to the first token; None if there was none.
        total_s: seconds from the call to the last message.
    """

    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    first_s: float | None
    total_s: float

    @property
    def per_token_s(self) -> float | None:
        """Seconds per token after the first (TPOT); None with fewer than two."""
        if self.first_s is None or self.completion_tokens < 2:
            return None
        return (self.total_s - self.first_s) / (self.completion_tokens - 1)


def summary(timing: Timing) -> str:
    """One line: usage, time to first token, time per output token."""
    parts = [
        f"{timing.prompt_tokens} prompt tokens, {timing.completion_tokens} generated ({timing.finish_reason})"
    ]
    if timing.first_s is not None:
        parts.append(f"TTFT {timing.first_s * 1e3:.1f} ms")
    if timing.per_token_s:
        parts.append(f"TPOT {timing.per_token_s * 1e3:.2f} ms ({1 / timing.per_token_s:.1f} tokens/s)")
    return ", ".join(parts)


def reason_name(reason: "inference_pb2.FinishReason.ValueType") -> str:
    """ "stop" for FINISH_REASON_STOP, and so on; the number of one that a newer server knows."""
    if reason not in inference_pb2.FinishReason.values():
        return str(reason)
    return inference_pb2.FinishReason.Name(reason).removeprefix(_PREFIX).lower()
