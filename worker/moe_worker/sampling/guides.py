"""Masks of the tokens that texts with an output format may go on with, computed during the forward pass.

Legend: B rows that sample, M rows with a format, V vocabulary, W words of 32 bits for it.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from moe_worker.sampling.grammar import grammar_of, limits
from moe_worker.sampling.output_format import OutputFormat

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer, TokenizerWrapper

log = logging.getLogger(__name__)
_WORD_BITS = 32
_ALL, _NONE = -1, 0


class Vocabulary(Protocol):
    """The tokenizer of a model."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text."""


@dataclass(frozen=True)
class Allowed:
    """Masks of some rows, in order: rows_M int64; bits_MB uint8 [M, 4 W], bit i of byte j: token 8 j + i."""

    rows_M: Tensor
    bits_MB: Tensor
    vocab_size: int

    @cached_property
    def refused(self) -> Tensor:
        """bool: the other tokens. On a GPU the bits are spread there, since fewer bytes are copied."""
        if self.bits_MB.is_cuda:
            places = torch.arange(8, dtype=torch.uint8, device=self.bits_MB.device)
            return (self.bits_MB.unsqueeze(-1) >> places & 1).flatten(1)[:, : self.vocab_size] == 0
        bits_MV = np.unpackbits(self.bits_MB.numpy(), axis=1, count=self.vocab_size, bitorder="little")
        return torch.from_numpy(bits_MV) == 0

    def masked(self, scores_BV: Tensor) -> Tensor:
        """A copy in which the scores of all other tokens are -inf."""
        if self.rows_M.shape[0] == scores_BV.shape[0]:
            return scores_BV.masked_fill(self.refused, -torch.inf)
        rows_MV = scores_BV.index_select(0, self.rows_M).masked_fill_(self.refused, -torch.inf)
        return scores_BV.index_copy(0, self.rows_M, rows_MV)


@dataclass
class _Unguided:
    """The beginning of a text, up to the first occurrence of `after`, which any tokens may make."""

    after: bytes
    _tail: bytes = b""

    @property
    def waits(self) -> bool:
        return bool(self.after)

    def take(self, text: bytes) -> None:
        self._tail += text
        if self.after in self._tail:
            self.after = b""
        self._tail = self._tail[-len(self.after) :]


@dataclass
class Guide:
    """The state of one text in its format. matcher: of the tokens so far; is being compiled."""

    matcher: "Future[LLMatcher]"
    unguided: _Unguided

    def take(self, token: int, text: bytes) -> bool:
        """Notes a token of the text, and the bytes it adds; nothing once the text cannot go on.

        Returns whether the text has its format and cannot go on.
        """
        if self.unguided.waits:
            self.unguided.take(text)
        elif not self.matcher.result().is_stopped():
            self.matcher.result().consume_token(token)
        if self.unguided.waits:
            return False
        matcher = self.matcher.result()
        return matcher.is_stopped() and not matcher.is_error()

    @property
    def failed(self) -> bool:
        """Whether the format became too complex to compute masks for."""
        return not self.unguided.waits and self.matcher.result().is_error()


class Guides:
    """Compiles formats in one thread and computes masks in another (llguidance releases the GIL).

    Compiling takes up to seconds for a hostile format, and masks of other texts do not wait for it.

    Args:
        vocabulary: of the model.
        vocab_size: number of logits.
        ends: the model's end-of-text tokens.
        threads: for the masks of one step.
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, ends: Sequence[int], threads: int) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._ends = ends
        self._threads = threads

    def open(self, output_format: OutputFormat, written: Sequence[int]) -> Guide:
        """The guide of a text, which begins with the tokens `written`; compiles in the background.

        `Guide.matcher` is done then. A step that samples this text waits for it. For any thread.
        """
        unguided = _Unguided(output_format.after.encode())
        guided = deque(written)
        while guided and unguided.waits:
            unguided.take(self._vocabulary.token_bytes(guided.popleft()))
        return Guide(self._compiling.submit(self._compile, output_format, list(guided)), unguided)

    def begin(
        self, guided: Sequence[tuple[int, Guide]], device: torch.device
    ) -> Callable[[], Allowed | None]:
        """Starts to compute the masks of some rows; the result waits for them. None: there are no rows."""
        if not guided:
            return lambda: None
        return self._masking.submit(self._masks, guided, device).result

    def _masks(self, guided: Sequence[tuple[int, Guide]], device: torch.device) -> Allowed:
        words = -(-self._vocab_size // _WORD_BITS)
        bits_MW = torch.full((len(guided), words), _ALL, dtype=torch.int32, pin_memory=device.type == "cuda")
        matchers = [
            (guide.matcher.result(), place)
            for place, (_, guide) in enumerate(guided)
            if not guide.unguided.waits
        ]
        live = [(matcher, place) for matcher, place in matchers if not matcher.is_stopped()]
        if live:
            self._executor.unsafe_compute_mask_ptr(live, bits_MW.data_ptr(), words * 4, len(guided))
        for matcher, place in matchers:
            if matcher.is_error():
                log.warning("a text with an output format fails: %s", matcher.get_error()[:300])
                bits_MW[place] = _NONE
        rows_M = torch.tensor([row for row, _ in guided], device=device)
        bits_MB = bits_MW.view(torch.uint8).to(device, non_blocking=True)
        allowed = Allowed(rows_M, bits_MB, self._vocab_size)
        if device.type == "cpu":
            _ = allowed.refused  # computed during the forward pass
        return allowed

    def _compile(self, output_format: OutputFormat, written: list[int]) -> "LLMatcher":
        from llguidance import LLMatcher  # noqa: PLC0415 - optional

        matcher = LLMatcher(self._tokenizer, grammar_of(output_format), log_level=0, limits=limits())
        matcher.consume_tokens(written)
        return matcher

    @cached_property
    def _compiling(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "formats")

    @cached_property
    def _masking(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "masks")

    @cached_property
    def _executor(self) -> "LLExecutor":
        from llguidance import LLExecutor  # noqa: PLC0415 - optional

        return LLExecutor(self._threads)

    @cached_property
    def _tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer  # noqa: PLC0415 - optional

        return LLTokenizer(
            cast("TokenizerWrapper", _Tokens(self._vocabulary, self._vocab_size, self._ends[0])),
            n_vocab=self._vocab_size,
            eos_token=list(self._ends),
        )


@dataclass
class _Tokens:
    """A vocabulary as llguidance's TokenizerWrapper."""

    vocabulary: Vocabulary
    vocab_size: int
    eos_token_id: int
    bos_token_id: int | None = None
    is_tokenizer_wrapper: bool = True
    tokens: list[bytes] = field(init=False)
    special_token_ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = [self.vocabulary.token_bytes(token) for token in range(self.vocab_size)]
        self.special_token_ids = [token for token, text in enumerate(self.tokens) if not text]

    def __call__(self, text: str) -> list[int]:
        return self.vocabulary.encode(text, False)
