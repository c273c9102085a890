"""How far a decode step is fused: what it launches, against the eager model of transformers.

On a GPU these are kernels; on a CPU calls of torch operators that compute something (views are left out) and
of the native kernels, of which a fused pass over all layers is one.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_api.visible import one_line
from moe_worker.config.directory import find_checkpoint
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.loading import LoadedModel, load
from moe_worker.kernels.cpu.library import Kernels
from moe_worker.models.batch import Batch, Segment

PROMPT = 8
# The unfused model is created whole, with random weights.
MOST_PARAMETERS = 2_000_000_000


@dataclass(frozen=True)
class LaunchCount:
    """Launches of a decode step of one token. unit: "kernels" or "operators". unfused: a sentence where it
    could not be counted.
    """

    unit: str
    ours: int
    unfused: int | str

    def __str__(self) -> str:
        own = (
            f"a decode step of one token takes {self.ours} {self.unit if self.ours != 1 else self.unit[:-1]}"
        )
        if isinstance(self.unfused, str):
            return f"{own}; {self.unfused}"
        rate = 1 - self.ours / self.unfused
        compared = f"{abs(rate):.1%} {'fewer' if rate >= 0 else 'more'}"
        return f"{own}, {self.unfused} in the eager model of transformers: {compared}"


class Operators(TorchDispatchMode):
    """Counts calls of operators, views left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [each.alias_info for each in func._schema.returns]  # noqa: SLF001 - nothing else says it
        self.count += not any(alias is not None and not alias.is_write for alias in aliases)
        return func(*args, **(kwargs or {}))


def measure_fusion(directory: Path, options: EngineOptions) -> LaunchCount:
    """Counts a step of a checkpoint. Raises WorkerError."""
    settings = replace(options, context_length=4 * PROMPT, max_batch_size=1, prefix_cache=False)
    loaded = load(directory, settings, progress=True)
    on_gpu = loaded.device.type == "cuda"
    with torch.inference_mode():
        step = _own_step(loaded)
        ours = kernels_of(step) if on_gpu else _calls_of(step)
        return LaunchCount("kernels" if on_gpu else "operators", ours, _unfused(directory, loaded))


def kernels_of(work: Callable[[], object]) -> int:
    """Kernels that `work` runs on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return sum(each.count for each in seen.key_averages() if each.device_time_total)


def _calls_of(work: Callable[[], object]) -> int:
    """Calls of torch operators and of native kernels."""
    native, seen = 0, Operators()

    def watch(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal native
        native += event == "call" and frame.f_code is Kernels.run.__code__

    with seen:
        sys.setprofile(watch)
        try:
            work()
        finally:
            sys.setprofile(None)
    return seen.count + native


def _own_step(loaded: LoadedModel) -> Callable[[], object]:
    """A step behind a prompt."""
    cache, prompt = loaded.cache, tuple(range(2, 2 + PROMPT))
    pages = array("i", range(cache.shape.pages_for(PROMPT + 1)))
    loaded.runner.logits(Batch.of([Segment(prompt, 0, pages)], cache), cache, [PROMPT - 1])
    batch = Batch.of([Segment((2,), PROMPT, pages)], cache)
    return lambda: loaded.runner.logits(batch, cache, [0])


def _eager(directory: Path, device: torch.device) -> Any:
    """The model of transformers with random weights. Raises what transformers raises if it cannot make it."""
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - optional

    # A program that a checkpoint brings is never run.
    config: Any = AutoConfig.from_pretrained(find_checkpoint(directory), trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    make: Any = AutoModelForCausalLM.from_config
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.bfloat16}
    with torch.device(device):
        return make(config, trust_remote_code=False, **options).eval()


def eager_step(model: Any, prompt: torch.Tensor, token: torch.Tensor) -> Callable[[], object]:
    """A decode step of a model of transformers behind a prompt, which is computed at once."""
    found = model(prompt, use_cache=True)
    # transformers 5.24 warns of the old name, which 5.17 has alone.
    name = "cache" if "cache" in found else "past_key_values"
    cached = {name: found[name]}
    return lambda: model(token, use_cache=True, **cached)


def _unfused(directory: Path, loaded: LoadedModel) -> int | str:
    """Launches of the same step in transformers; a sentence where there is none."""
    if loaded.config.parameters_total > MOST_PARAMETERS:
        return f"the eager model was not counted: it has {loaded.config.parameters_total:,} parameters"
    try:
        model = _eager(directory, loaded.device)
    except ImportError:
        return "the eager model was not counted: transformers is not installed"
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        return f"the eager model was not counted: this transformers cannot make it ({one_line(str(error))})"
    with torch.device(loaded.device):
        tokens = torch.arange(2, 2 + PROMPT)[None]
    step = eager_step(model, tokens, tokens[:, :1])
    step()
    if loaded.device.type == "cuda":
        return kernels_of(step)
    seen = Operators()
    with seen:
        step()
    return seen.count
