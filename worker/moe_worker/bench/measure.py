"""Runs batches of random prompts through the engine and times its steps."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.requests import Request
from moe_worker.errors import SettingsError
from moe_worker.sampling.parameters import SamplingParameters


@dataclass(frozen=True)
class Workload:
    """The load: `prompt` tokens in and `tokens` out for each sequence of a batch.

    temperature: 0 is greedy.
    """

    prompt: int
    tokens: int
    rounds: int
    temperature: float = 0.0


@dataclass(frozen=True)
class Result:
    """Medians over the rounds for one batch size.

    prefill_tokens_per_s: prompt tokens of the whole batch over the time until its last first token.
    ttft_ms: time to first token, median of the sequences, all submitted at once. tpot_ms: time per output
    token of a stream while the whole batch decodes. decode_tokens_per_s: of all streams together, then.
    """

    batch: int
    prefill_tokens_per_s: float
    ttft_ms: float
    tpot_ms: float
    decode_tokens_per_s: float


def measure(
    loaded: LoadedModel, options: EngineOptions, load: Workload, batch: int, on_round: Callable[[], object]
) -> Result:
    """Times `load.rounds` rounds of `batch` sequences after a warm-up round.

    Raises SettingsError if a sequence exceeds the context length.
    """
    if load.prompt + load.tokens > loaded.context:
        raise SettingsError(
            f"--prompt {load.prompt} and --tokens {load.tokens} exceed the context length of {loaded.context}"
        )
    own = replace(options, max_batch_size=batch, max_queue=0)
    rounds = []
    for number in range(load.rounds + 1):
        rounds.append(_round(EngineCore(loaded, own), load, batch, seed=number))
        on_round()
    return Result(batch, *(median(values) for values in zip(*rounds[1:], strict=True)))


def as_json(result: Result) -> dict[str, float]:
    """The result's fields by name."""
    return asdict(result)


def _round(core: EngineCore, load: Workload, batch: int, seed: int) -> tuple[float, float, float, float]:
    for request in _requests(core, load, batch, seed):
        core.submit(request)
    began, first, ends = time.perf_counter(), {}, []
    while not core.idle:
        deltas = core.step()
        now = time.perf_counter()
        first.update({delta.id: now - began for delta in deltas if delta.id not in first})
        if len(first) == batch:
            ends.append(now)
    per_token = (ends[-1] - ends[0]) / (len(ends) - 1)
    return (
        batch * load.prompt / max(first.values()),
        1e3 * median(first.values()),
        1e3 * per_token,
        batch / per_token,
    )


def _requests(core: EngineCore, load: Workload, batch: int, seed: int) -> Sequence[Request]:
    """Prompts without common prefixes, with end-of-text tokens ignored."""
    rng = random.Random(seed)  # noqa: S311 - a workload, no secret
    sampling = SamplingParameters(load.tokens, load.temperature, ignore_eos=True)
    return [
        Request(number, tuple(rng.choices(range(core.vocab_size), k=load.prompt)), sampling, seed=number)
        for number in range(batch)
    ]
