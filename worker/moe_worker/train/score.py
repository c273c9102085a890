"""Bits per byte: bits that a model needs per byte of text, independent of its tokenizer.

Protocol: every document is scored alone. Its tokens follow one begin-of-text token and are split into windows
of `context` tokens without overlap; a later window begins with the previous token, so that each token of the
document is predicted exactly once. The sum of the negative log-likelihoods, in bits, is divided by the UTF-8
bytes of the documents. The end-of-text token is neither given nor scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Window = NDArray[np.int32]
"""Up to context + 1 token ids: each but the last is given, each but the first is predicted."""


@dataclass(frozen=True)
class Score:
    """The score of a model on some documents."""

    nats: float
    """Negative log-likelihood of all tokens, natural logarithm."""
    tokens: int
    """Tokens predicted."""
    utf8_bytes: int
    """Bytes of text."""
    documents: int

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text; lower is better."""
        return self.nats / math.log(2) / self.utf8_bytes

    def to_json(self) -> dict[str, float | int]:
        """Returns what `moe-worker eval --json` prints."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "bits": self.nats / math.log(2),
            "utf8_bytes": self.utf8_bytes,
            "tokens": self.tokens,
            "documents": self.documents,
        }


def cut_windows(tokens_N: Window, context: int, bos_id: int) -> Iterator[Window]:
    """Splits the N token ids of one document into windows of at most `context` given tokens."""
    behind_bos = np.concatenate([np.array([bos_id], np.int32), tokens_N])
    for start in range(0, len(tokens_N), context):
        yield behind_bos[start : start + context + 1]


def score_documents(
    documents: Sequence[str],
    tokens: Sequence[Window],
    context: int,
    bos_id: int,
    nats: Callable[[Sequence[Window]], float],
    progress: Callable[[int], object] = lambda _: None,
    together: int = 1,
) -> Score:
    """Scores documents with a model.

    Args:
        documents: texts, for their bytes.
        tokens: the token ids of each, without special tokens.
        context: tokens that the model is given at most.
        bos_id: id of the begin-of-text token.
        nats: returns the summed negative log-likelihood of some windows' tokens after the first of each.
        progress: called with the number of tokens that completed windows predicted.
        together: windows that `nats` is given at once, at most; those of similar length.
    """
    windows = [window for document in tokens for window in cut_windows(document, context, bos_id)]
    windows.sort(key=len, reverse=True)
    total = 0.0
    for first in range(0, len(windows), together):
        some = windows[first : first + together]
        total += nats(some)
        progress(sum(len(window) - 1 for window in some))
    return Score(
        nats=total,
        tokens=sum(len(document) for document in tokens),
        utf8_bytes=sum(len(document.encode()) for document in documents),
        documents=len(documents),
    )
