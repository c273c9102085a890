"""Input and output of the engine. No torch: the RPC edge uses these types too."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from moe_worker.sampling.logprobs import TokenLogprobs
from moe_worker.sampling.output_format import OutputFormat
from moe_worker.sampling.parameters import SamplingParameters, Violation
from moe_worker.scheduler.plan import Block


class FinishReason(Enum):
    """Why a text ended."""

    STOP = "stop"  # the model ended it, or a stop text occurred
    LENGTH = "length"  # max_tokens or the context length was reached
    DEADLINE = "deadline"  # its deadline passed
    FAILED = "failed"  # no token can be selected by the model's scores (NaN)
    FORMAT = "format"  # the output format is too complex to go on with


@dataclass(frozen=True)
class Request:
    """A prompt to continue. `seed` is the effective one: sampling.seed, or a new random one.

    priority: 0 to 9, higher is sooner. deadline: on the engine's clock, in seconds; None: none.
    written: tokens that another engine has emitted; this one continues after them.
    output_format: what the text must be; None: any text.
    tenant, weight: whose request it is, and its share of the machine relative to other tenants.
    salt: requests with different ones share no cached prefix. blocks: of the prompt that have names.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: SamplingParameters
    seed: int
    priority: int = 0
    deadline: float | None = None
    written: tuple[int, ...] = ()
    output_format: OutputFormat | None = None
    tenant: str = ""
    weight: int = 1
    salt: str = ""
    blocks: tuple[Block, ...] = ()

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt are wanted; a stream that is resumed has them."""
        return self.sampling.prompt_logprobs is not None and not self.written


class Delta(NamedTuple):
    """The result of one step for a request. Text waits for complete characters and stop texts; tokens do not.

    A tuple, because every step sends one for each stream to the edge: it is a list on the wire.

    `token` is None if the request ends without one, in an error, and while its prompt is scored. logprobs: of
    the token, if requested. prompt: of the next tokens of the prompt, from the second one on, if requested.
    """

    id: int
    text: str
    token: int | None
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    prompt: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Load:
    """The load of the engine; KV figures are tokens in whole pages, `cached` those of idle prefixes."""

    queued: int = 0
    running: int = 0
    kv_tokens_capacity: int = 0
    kv_tokens_used: int = 0
    kv_tokens_cached: int = 0


def length_violation(field: str, length: int, context_length: int) -> Violation | None:
    """The problem with a prompt of this many tokens; there must be room for one more token."""
    if length == 0:
        return Violation(field, "is empty; give at least one token")
    if length >= context_length:
        allowed = f"use {context_length - 1} at most, the context length of {context_length} less one"
        return Violation(field, f"has {length} tokens; {allowed}", too_long=True)
    return None


def prompt_violations(
    field: str, prompt: Sequence[int], vocab_size: int, context_length: int
) -> list[Violation]:
    """The problem with the token ids of a prompt; ids are checked only if there are not too many."""
    if wrong_length := length_violation(field, len(prompt), context_length):
        return [wrong_length]
    wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if wrong is not None:
        return [Violation(field, f"has token id {wrong}; ids are 0 to {vocab_size - 1}")]
    return []
