"""A random model as the engine takes it: over the kernels on a GPU, in plain torch on a CPU."""

from typing import Any

import torch

from benchmarks.gpu_random import NO_TEXT, random_model
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.loading import LoadedModel
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.models.runner import ModelRunner, Runner

PAGE = 16


def random_loaded(
    values: dict[str, Any],
    number_format: str,
    options: EngineOptions,
    context: int,
    tokens: int | None = None,
) -> LoadedModel:
    """The model of the configuration `values`.

    options: device ("cuda" or "cpu"), max_batch_size and prefill_tokens count. tokens: of the cache; None: as
    many contexts as sequences.
    """
    device, sequences = torch.device(options.device), options.max_batch_size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.inference_mode():
        model = random_model(values, number_format, context, device, dtype)
        config = model.config
        shape = CacheShape(config.num_hidden_layers, config.attention.cache_width, PAGE, dtype)
        pages = sequences * shape.pages_for(context) if tokens is None else shape.pages_for(tokens)
        cache = PagedCache.allocate(shape, pages, device)
        runner: Runner = ModelRunner(model)
        if device.type == "cuda":
            from moe_worker.models.cuda_build import prepare  # noqa: PLC0415 - triton is not everywhere
            from moe_worker.models.cuda_runner import CudaRunner  # noqa: PLC0415

            runner = CudaRunner(
                prepare(model, consume=True), cache, sequences, context, options.prefill_tokens, progress=True
            )
    return LoadedModel(config, runner, NO_TEXT, cache, context, number_format)
