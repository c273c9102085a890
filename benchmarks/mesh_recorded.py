"""Choices of a model's routers on texts, window by window."""

from collections.abc import Sequence
from pathlib import Path

import torch

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.loading import load
from moe_worker.models.batch import Batch, Segment

WINDOW = 2048


class Recorder:
    """Texts one behind the other. windows: how many they fill. nats: summed over the tokens scored so far."""

    def __init__(self, model: Path, texts: Sequence[Path]) -> None:
        self.loaded = load(model, EngineOptions(device="cpu", threads=1, max_batch_size=1), progress=False)
        self._tokens = self.loaded.tokenizer.encode("\n".join(path.read_text() for path in texts))
        self.windows = len(self._tokens) // WINDOW
        self.nats, self.scored = 0.0, 0

    @torch.inference_mode()
    def counts(self, number: int, *, scores: bool = False) -> list[list[float]]:
        """Choices [L, E] in a window, in parts of half the context. scores: adds to nats."""
        runner, cache = self.loaded.runner, self.loaded.cache
        counter, chunk = runner.expert_counter(), self.loaded.context // 2
        end = (number + 1) * WINDOW
        for first in range(number * WINDOW, end, chunk):
            part = self._tokens[first : min(first + chunk, end)]
            pages = range(-(-len(part) // cache.page_size))
            rows = range(len(part)) if scores else [0]
            logits_NV = runner.logits(Batch.of([Segment(part, 0, pages)], cache), cache, rows)
            counter.count(len(part))
            if scores:
                targets = torch.tensor(part[1:])
                self.nats += float(
                    torch.nn.functional.cross_entropy(logits_NV[:-1], targets, reduction="sum")
                )
                self.scored += len(targets)
        return [[float(count) for count in counts] for _, counts, _ in counter.read()[1]]
