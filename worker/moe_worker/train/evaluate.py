"""Scores a checkpoint on a text file with the serving engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from moe_worker.config.directory import find_checkpoint, read_checkpoint_config
from moe_worker.config.model import ModelConfig
from moe_worker.engine.offline import Engine
from moe_worker.errors import SettingsError
from moe_worker.progress import bar
from moe_worker.train.data import read_documents
from moe_worker.train.score import Score, Window, score_documents


def score_checkpoint(
    checkpoint: Path,
    data: Path,
    *,
    context: int | None,
    device: str,
    dtype: str,
    number_format: str = "auto",
    kv_dtype: str = "auto",
) -> Score:
    """Returns the score of the model in `checkpoint` on the documents in `data`.

    `number_format`: of the weights, of moe_worker.config.engine.FORMATS. `kv_dtype`: of its KV_DTYPES.

    Raises:
        WorkerError: the checkpoint or the text cannot be used, or `context` is longer than the model allows.
    """
    documents = read_documents(data)
    window_of(read_checkpoint_config(find_checkpoint(checkpoint)), context)
    engine = Engine(
        checkpoint, device=device, dtype=dtype, format=number_format, kv_dtype=kv_dtype, progress=True
    )
    return score_engine(engine, documents, context)


def window_of(config: ModelConfig, context: int | None) -> tuple[int, int]:
    """Tokens of a window, `context` or as many as the model allows, and the one that documents begin with.

    Raises SettingsError.
    """
    longest, bos_id = config.max_position_embeddings, config.bos_token_id
    if bos_id is None:
        raise SettingsError("the checkpoint's config.json names no bos_token_id, which documents begin with")
    if context is not None and context > longest:
        raise SettingsError(f"--context is {context}; the model allows {longest} tokens at most")
    return context or longest, bos_id


def score_engine(
    engine: Engine, documents: list[str], context: int | None, passed: Callable[[int], None] = lambda _: None
) -> Score:
    """The score of a loaded model; `passed` is told the tokens of each forward pass after it. Raises
    SettingsError.
    """
    window, bos_id = window_of(engine.config, context)
    tokens = [
        np.asarray(engine.tokenizer.encode(document, add_special_tokens=False), np.int32)
        for document in bar(documents, desc="tokenize", unit="document")
    ]

    def nats(windows: Sequence[Window]) -> float:
        (window,) = windows
        logits_TV = engine.logits(window[:-1].tolist())
        passed(len(window) - 1)
        targets_T = torch.from_numpy(window[1:].astype(np.int64))
        return float(torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum"))

    with bar(total=sum(map(len, tokens)), desc="score", unit="token", unit_scale=True) as scored:
        return score_documents(documents, tokens, window, bos_id, nats, scored.update)
