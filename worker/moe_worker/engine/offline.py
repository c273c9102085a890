"""The engine as a Python library."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe_worker.config.engine import EngineOptions
from moe_worker.config.model import ModelConfig
from moe_worker.engine.loading import load
from moe_worker.errors import RequestError
from moe_worker.kvcache.latent import LatentCache
from moe_worker.models.attention import Span
from moe_worker.models.tokenizer import Tokenizer


class Engine:
    """A model loaded for offline use.

    `path` is a Hugging Face checkpoint directory; `device`, `dtype` and the further `options` are those of
    EngineOptions. Raises WorkerError with a sentence where the checkpoint or an option cannot work.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        *,
        progress: bool = False,
        **options: int | None,
    ) -> None:
        self._options = EngineOptions(device=device, dtype=dtype, **options)  # type: ignore[arg-type]
        self._loaded = load(Path(path), self._options, progress)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self._loaded.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._loaded.tokenizer

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Scores of the token after each of `token_ids`: float32 [positions, vocabulary] on the CPU.

        The sequence is taken as given (no begin-of-text token is put before it) and may be as long as the
        context length. Raises RequestError.
        """
        check_token_ids(token_ids, self.config.vocab_size, self._loaded.cache.context)
        model = self._loaded.model
        scratch = LatentCache.allocate(self.config, 1, len(token_ids), model.dtype, model.device)
        return model.logits(model.forward(token_ids, [Span(0, 0, len(token_ids))], scratch)).cpu()


def check_token_ids(token_ids: Sequence[int], vocab_size: int, context: int) -> None:
    """Raises RequestError unless there are 1 to `context` ids, each below `vocab_size`."""
    if not 1 <= len(token_ids) <= context:
        raise RequestError("token_ids", f"{len(token_ids)} token ids were given; it must be 1 to {context}")
    wrong = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise RequestError("token_ids", f"token id {wrong} is unknown; ids are 0 to {vocab_size - 1}")
