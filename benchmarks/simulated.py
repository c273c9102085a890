"""An engine whose steps compute nothing, but take as long as those of a GPU: a CPU shows what the edge adds.

    python -m benchmarks.simulated FD    # in place of moe_worker.service.engine_process

Times are those of W4A8 on one H200 (docs/benchmarks.md). The host's part of a step is real, and hidden while
it is shorter than the step.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from moe_worker.config.directory import read_checkpoint_config
from moe_worker.config.engine import EngineOptions
from moe_worker.config.model import ModelConfig
from moe_worker.engine import loading
from moe_worker.engine.loading import LoadedModel
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.models.batch import Batch
from moe_worker.models.runner import Runner
from moe_worker.models.tokenizer import Tokenizer

# Seconds of a step, and of each token in it: 3.83 ms for 64 tokens, 6.03 for 256, 26 for 2,048.
STEP_S, TOKEN_S = 3.1e-3, 11.5e-6
IDLE_S = 0.05  # longer pauses are the engine's, which had nothing to compute


class Paced:
    """A Runner that returns prepared logits when a GPU would have them."""

    def __init__(self, batch: int, vocabulary: int) -> None:
        self._logits_NV = torch.randn(batch, vocabulary)
        self._ended = 0.0

    def logits(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
        del cache
        now = time.monotonic()
        begun = self._ended if now - self._ended < IDLE_S else now
        self._ended = max(now, begun + STEP_S + TOKEN_S * len(batch.tokens))
        time.sleep(self._ended - now)
        return self._logits_NV[: len(rows)]

    def expert_counter(self) -> "Paced":
        return self

    def count(self, tokens: int) -> None:
        del tokens

    def read(self) -> tuple[int, list[tuple[int, list[int], int]]]:
        return 0, []


def load(
    directory: Path,
    options: EngineOptions,
    progress: bool,
    load_tokenizer: Callable[[Path, ModelConfig], Tokenizer] = Tokenizer.load,
    prepare_formats: bool = False,
) -> LoadedModel:
    """In place of `loading.load`."""
    del progress, prepare_formats
    torch.set_num_threads(1)
    config = read_checkpoint_config(directory, options.config_override)
    context = options.context_for(config.max_position_embeddings)
    shape = CacheShape(1, 1, options.page_size, torch.float32)
    pages = options.max_batch_size * shape.pages_for(context)
    cache = PagedCache.allocate(shape, pages, torch.device("cpu"))
    runner = cast("Runner", Paced(options.max_batch_size, config.vocab_size))
    return LoadedModel(config, runner, load_tokenizer(directory, config), cache, context, "w4a8")


def main() -> None:
    loading.load = load
    from moe_worker.service import engine_process  # noqa: PLC0415 - it imports `load`

    engine_process.main()


if __name__ == "__main__":
    main()
