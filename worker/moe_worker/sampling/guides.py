"""Masks of the tokens that texts with an output format may go on with.

Legend: B rows that sample, or bytes of a mask; M rows with a format, V vocabulary.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from moe_worker.kernels.transfer import to_device
from moe_worker.sampling.grammar import available, grammar_of, limits
from moe_worker.sampling.output_format import OutputFormat

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer, TokenizerWrapper

log = logging.getLogger(__name__)
_WORD_BITS = 32
_ALL, _NONE = 255, 0
SLOW_S: Final = 0.001
"""Where masks of one call take longer, those of each owner are measured, in one of MEASURED_STEPS steps."""
MEASURED_STEPS: Final = 8
"""Calls for each owner take longer where owners are many: one text uses one thread."""
MOST_OWNERS: Final = 1024
TEXTS_OF_A_LEXER: Final = 8
"""Texts of one format that share a lexer: its states, their bound, and a lock."""


class Vocabulary(Protocol):
    """The tokenizer of a model."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text."""


@dataclass(frozen=True)
class Allowed:
    """Masks of some rows, rising; bits_MB: uint8, bit i of byte j is of token 8 j + i."""

    rows: Sequence[int]
    bits_MB: Tensor
    vocab_size: int

    @property
    def refused(self) -> Tensor:
        """bool: the other tokens. On a GPU the bits are spread there, since fewer bytes are copied."""
        if self.bits_MB.is_cuda:
            places = torch.arange(8, dtype=torch.uint8, device=self.bits_MB.device)
            return (self.bits_MB.unsqueeze(-1) >> places & 1).flatten(1)[:, : self.vocab_size] == 0
        others_MB = ~self.bits_MB.numpy()
        others_MV = np.unpackbits(others_MB, axis=1, count=self.vocab_size, bitorder="little")
        return torch.from_numpy(others_MV.view(np.bool_))

    def masked(self, scores_BV: Tensor) -> Tensor:
        """A copy in which the scores of all other tokens are -inf."""
        if len(self.rows) == scores_BV.shape[0]:
            return torch.where(self.refused, scores_BV.new_full((), -torch.inf), scores_BV)
        rows_M = to_device(torch.tensor(self.rows), scores_BV.device)
        rows_MV = scores_BV.index_select(0, rows_M).masked_fill_(self.refused, -torch.inf)
        return scores_BV.index_copy(0, rows_M, rows_MV)


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


@dataclass(eq=False)
class _Compiled:
    """A format; `pristine` has no text, and its copies share its lexer.

    copies: so far. failed: whether one of them became too complex; there are no more copies then.
    """

    pristine: "LLMatcher"
    copies: int = 0
    failed: bool = False

    @property
    def spent(self) -> bool:
        return self.failed or self.copies == TEXTS_OF_A_LEXER


class TextMatcher(NamedTuple):
    """own: of one text. compiled: what it is a copy of, which is kept as long as the text has its guide."""

    own: "LLMatcher"
    compiled: _Compiled


@dataclass
class Guide:
    """The state of one text in its format. matcher: of the tokens so far; is being compiled.

    owner: the tenant whose text it is. seconds: that its masks took and nobody has taken note of.
    """

    matcher: Future[TextMatcher]
    unguided: _Unguided
    owner: str = ""
    seconds: float = 0.0

    def take_seconds(self) -> float:
        """What its masks took since the last call."""
        found, self.seconds = self.seconds, 0.0
        return found

    def take(self, token: int, text: bytes) -> bool:
        """Notes a token of the text, and the bytes it adds; nothing once the text cannot go on.

        Returns whether the text has its format and cannot go on.
        """
        if self.unguided.waits:
            self.unguided.take(text)
        elif not self.own.is_stopped():
            self.own.consume_token(token)
        return not self.unguided.waits and self.own.is_stopped() and not self.own.is_error()

    @cached_property
    def own(self) -> "LLMatcher":
        """The matcher; waits until it is compiled."""
        return self.matcher.result().own

    @property
    def failed(self) -> bool:
        """Whether the format became too complex to compute masks for."""
        return not self.unguided.waits and self.own.is_error()


class Guides:
    """Compiles formats in a thread of its own, and computes masks in the thread that asks for them.

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
        self._step, self._slow_until = 0, 0
        self._measured: dict[str, _Measured] = {}
        self._compiled: WeakValueDictionary[tuple[str, OutputFormat], _Compiled] = WeakValueDictionary()

    def open(self, output_format: OutputFormat, written: Sequence[int], salt: str = "") -> Guide:
        """The guide of a text, which begins with the tokens `written`; compiles in the background.

        `Guide.matcher` is done then. A step that samples this text waits for it. For any thread. salt: texts
        with different ones share nothing.
        """
        unguided = _Unguided(output_format.after.encode())
        guided = deque(written)
        while guided and unguided.waits:
            unguided.take(self._vocabulary.token_bytes(guided.popleft()))
        return Guide(self._compiling.submit(self._compile, output_format, list(guided), salt), unguided)

    def prepare(self) -> None:
        """Reads the vocabulary before the first format does: all streams would stand still meanwhile.

        With 128,000 tokens it takes 0.6 s, most of it in llguidance, which holds the GIL, and 70 MB.
        """
        if not available() or not self._ends:  # no format is used then
            return
        try:
            _ = self._tokenizer
        except Exception:
            log.exception("output formats cannot be used with this vocabulary")

    def masks(self, guided: Sequence[tuple[int, Guide]], device: torch.device) -> Allowed:
        """The masks of some rows, by the calling thread; waits until their formats are compiled."""
        size = -(-self._vocab_size // _WORD_BITS) * _WORD_BITS // 8
        bits_MB = torch.empty(len(guided), size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        rows = bits_MB.numpy()
        live = []
        for place, (_, guide) in enumerate(guided):
            if guide.unguided.waits:
                rows[place] = self._going_on
            elif guide.own.is_stopped():
                rows[place] = _ALL
            else:
                live.append((guide, place))
        self._compute(live, bits_MB)
        for place, (_, guide) in enumerate(guided):
            if guide.failed:
                log.debug("a text with an output format fails: %s", guide.own.get_error()[:300])
                guide.matcher.result().compiled.failed = True
                rows[place] = _NONE
        if device.type == "cuda":
            bits_MB = bits_MB.to(device, non_blocking=True)
        return Allowed([row for row, _ in guided], bits_MB, self._vocab_size)

    def _compute(self, guides: list[tuple[Guide, int]], bits_MB: Tensor) -> None:
        """The masks of `guides`, each at its place; llguidance releases the GIL meanwhile."""
        if self._threads > 1 and len(guides) > 1:
            self._compute_in_threads(guides, bits_MB)
            return
        start, size = bits_MB.data_ptr(), bits_MB.shape[1]
        for guide, place in guides:  # another thread would cost more than one mask
            began = time.thread_time()  # without what other threads take of the processor and the GIL
            guide.own.unsafe_compute_mask_ptr(start + place * size, size)
            guide.seconds += time.thread_time() - began

    def _compute_in_threads(self, guides: list[tuple[Guide, int]], bits_MB: Tensor) -> None:
        """One call, whose time texts share as those of their owners were measured; calls of their own for
        owners that are to be measured.
        """
        self._step += 1
        slow, rest = self._step < self._slow_until, []
        for owner, texts in _by_owner(guides).items():
            known = self._measured.get(owner)
            if not slow or (known is not None and self._step < known.step + MEASURED_STEPS):
                rest += texts
                continue
            each_s = self._call(texts, bits_MB) / len(texts)
            self._measured.pop(owner, None)
            self._measured[owner] = _Measured(max(1e-9, each_s), self._step)
            for guide, _ in texts:
                guide.seconds += each_s
        while len(self._measured) > MOST_OWNERS:
            del self._measured[next(iter(self._measured))]
        if not rest:
            return
        known_s = [known.each_s for known in self._measured.values()]
        unknown = _Measured(sum(known_s) / len(known_s) if known_s else 1.0, 0)
        shares = [self._measured.get(guide.owner, unknown).each_s for guide, _ in rest]
        rate = self._call(rest, bits_MB) / sum(shares)
        for (guide, _), share in zip(rest, shares, strict=True):
            guide.seconds += rate * share

    def _call(self, guides: list[tuple[Guide, int]], bits_MB: Tensor) -> float:
        """Computes masks in threads; the seconds that it takes."""
        start, (places, size) = bits_MB.data_ptr(), bits_MB.shape
        matchers = [(guide.own, place) for guide, place in guides]
        began = time.monotonic()
        self._executor.unsafe_compute_mask_ptr(matchers, start, size, places)
        took = time.monotonic() - began
        if took > SLOW_S:
            self._slow_until = self._step + MEASURED_STEPS
        return took

    def _compile(self, output_format: OutputFormat, written: list[int], salt: str) -> TextMatcher:
        """A copy of the format's matcher that has taken `written`; one thread alone may call this.

        A copy takes 8 us where a format takes 0.3 ms or more, and a lexer in use is fast: its states exist,
        and few lines of the processor's caches hold it.
        """
        from llguidance import LLMatcher  # noqa: PLC0415 - optional

        compiled = self._compiled.get((salt, output_format))
        if compiled is None or compiled.spent:
            grammar = grammar_of(output_format)
            compiled = _Compiled(LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits()))
            self._compiled[salt, output_format] = compiled
        compiled.copies += 1
        own = compiled.pristine.deep_copy()
        own.consume_tokens(written)
        return TextMatcher(own, compiled)

    @cached_property
    def _going_on(self) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        """The mask of all tokens but those that end a text: one without its format ends by none."""
        allowed = np.full(-(-self._vocab_size // _WORD_BITS) * _WORD_BITS, fill_value=True)
        allowed[list(self._ends)] = False
        return np.packbits(allowed, bitorder="little")

    @cached_property
    def _compiling(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "formats")

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


class _Measured(NamedTuple):
    """Seconds of a mask of one owner, in call `step` of `_compute_in_threads`."""

    each_s: float
    step: int


def _by_owner(guides: list[tuple[Guide, int]]) -> dict[str, list[tuple[Guide, int]]]:
    found: dict[str, list[tuple[Guide, int]]] = {}
    for each in guides:
        found.setdefault(each[0].owner, []).append(each)
    return found


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
