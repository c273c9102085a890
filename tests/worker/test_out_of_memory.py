"""A device that has no memory for large steps: the engine goes on with smaller ones, and no token changes."""

from dataclasses import dataclass, replace

import pytest
import torch

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import load
from moe_worker.engine.requests import Request
from moe_worker.errors import DeviceMemoryError
from moe_worker.sampling.parameters import SamplingParameters

PROMPTS = [[7 + i % 290 for i in range(count)] for count in (150, 40, 3, 90, 60)]
SAMPLING = SamplingParameters(max_tokens=12, temperature=1.1, repetition_penalty=1.2, ignore_eos=True)


@dataclass
class Cramped:
    """A runner whose device holds passes of up to `tokens` tokens of `sequences` sequences."""

    inner: object
    tokens: int
    sequences: int
    lack: type = torch.OutOfMemoryError
    refused: int = 0

    def logits(self, batch, cache, rows):
        if len(batch.tokens_T) > self.tokens or len(batch.segments) > self.sequences:
            self.refused += 1
            if self.lack is RuntimeError:
                torch.empty(1 << 50, dtype=torch.uint8)  # as the allocator of CPUs says it
            raise self.lack("no memory")
        return self.inner.logits(batch, cache, rows)

    def expert_counter(self):
        return self.inner.expert_counter()


def run(loaded, options, flights):
    core = EngineCore(loaded, options, flights=flights)
    for number, prompt in enumerate(PROMPTS):
        core.submit(Request(number, tuple(prompt), SAMPLING, seed=number))
    tokens = [[] for _ in PROMPTS]
    for _ in range(2000):
        for delta in core.step():
            tokens[delta.id].append(delta.token)
        if core.idle:
            break
    assert core.idle
    assert core.load.kv_tokens_used == 0
    return tokens


@pytest.mark.parametrize("flights", [1, 2])
@pytest.mark.parametrize(("tokens", "sequences"), [(70, 8), (400, 2), (64, 1)])
def test_steps_shrink_until_they_fit(endless, flights, tokens, sequences):
    options = EngineOptions(device="cpu", dtype="float32", context_length=256, threads=1)
    loaded = load(endless, options, progress=False)
    expected = run(loaded, options, flights=1)
    runner = Cramped(loaded.runner, tokens, sequences)
    assert run(replace(loaded, runner=runner), options, flights) == expected
    assert 0 < runner.refused < 30


def test_a_device_without_room_for_one_token_ends_the_engine(endless):
    options = EngineOptions(device="cpu", dtype="float32", context_length=256, threads=1)
    loaded = load(endless, options, progress=False)
    with pytest.raises(
        DeviceMemoryError, match="no memory left for a step of one token; lower the KV memory"
    ):
        run(replace(loaded, runner=Cramped(loaded.runner, 0, 0)), options, flights=1)


@pytest.mark.parametrize("lack", [MemoryError, RuntimeError])
def test_steps_shrink_on_cpus_too(endless, lack):
    options = EngineOptions(device="cpu", dtype="float32", context_length=256, threads=1)
    loaded = load(endless, options, progress=False)
    expected = run(loaded, options, flights=1)
    runner = Cramped(loaded.runner, 70, 8, lack)
    assert run(replace(loaded, runner=runner), options, flights=1) == expected
    assert 0 < runner.refused < 30
