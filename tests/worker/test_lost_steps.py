"""Steps that a device sampled when a rank was lost do not count: their tokens may be anything."""

from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import torch

from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.engine.core import EngineCore
from moe_worker.engine.offline import Engine
from moe_worker.engine.requests import Request
from moe_worker.mesh.errors import RankLostError
from moe_worker.mesh.results import PassResult
from moe_worker.mesh.runner import MeshRunner
from moe_worker.models.batch import Batch, Fed
from moe_worker.sampling.output_format import OutputFormat
from moe_worker.sampling.parameters import SamplingParameters
from tests.checkpoints import write_checkpoint

OPTIONS = {"device": "cpu", "dtype": "float32", "threads": 1, "context_length": 128}
FORMAT = OutputFormat("regex", "[a-z]{3,9}-[0-9]{2}")
LOSSES = (2, 9, 10, 16)


class OneDevice(MeshRunner):
    """A mesh as the engine sees it on GPUs, where steps are sampled before the tokens of earlier ones arrive.

    losses: the passes in which a rank is lost. What they give, and what those behind them give, is wrong.
    """

    def __init__(self, runner, losses):
        self.member = SimpleNamespace(lost=None, returned=(), shape=MeshShape(1, 1))
        self.feeds, self.rebalancing, self.reforms = True, None, 0
        self._alone, self._losses, self._passes = runner, losses, 0
        self._fed = deque(maxlen=8)

    @property
    def shards(self):
        return (0,)

    def begin(self, batch, cache, rows, draws):
        assert not any(draws)
        self._passes += 1
        if self._passes in self._losses:
            self.member.lost = RankLostError("rank 1 is gone")
        ends = torch.tensor([segment.size for segment in batch.segments]).cumsum(0).tolist()
        fed = [
            Fed(self._fed[-segment.behind], [segment.source], [end - 1])
            for segment, end in zip(batch.segments, ends, strict=True)
            if segment.source >= 0
        ]
        segments = [
            each._replace(tokens=[max(0, token) for token in each.tokens], shard=0) for each in batch.segments
        ]
        logits = self._alone.logits(Batch.of(segments, cache, fed), cache, rows).clone()
        wrong = self.member.lost is not None
        return lambda: PassResult(-logits if wrong else logits, torch.empty(0, dtype=torch.int64))

    def feed(self, tokens):
        self._fed.append(tokens)

    def tend(self):
        """It learns of losses when the tokens are there."""

    def reform(self, error):
        assert error is self.member.lost
        self.member.lost, self.reforms = None, self.reforms + 1
        self._fed.clear()

    def expert_counter(self):
        return self._alone.expert_counter()


class LosesWhileShort(OneDevice):
    """It lacks memory for some passes, and loses a rank when it gives those in flight up."""

    def begin(self, batch, cache, rows, draws):
        if self._passes + 1 in self._losses:
            self._passes += 1
            raise torch.OutOfMemoryError("no memory")
        return super().begin(batch, cache, rows, draws)

    def discard(self):
        self.member.lost = RankLostError("rank 1 is gone")
        raise self.member.lost


def tokens_of(loaded, flights):
    core = EngineCore(loaded, EngineOptions(**OPTIONS), flights=flights)
    for number, wanted in enumerate((None, None, None, FORMAT)):
        sampling = SamplingParameters(
            max_tokens=20, temperature=0.9 if number else 0.0, frequency_penalty=0.5 if number == 2 else 0.0,
            seed=number, ignore_eos=wanted is None,
        )  # fmt: skip
        core.submit(Request(number, (5 + number, 6, 7), sampling, number, output_format=wanted))
    found = [[] for _ in range(4)]
    while not core.idle:
        for delta in core.step():
            found[delta.id].append(delta.token)
    return found


def test_no_token_of_a_step_that_ran_when_a_rank_was_lost_is_sent(tmp_path):
    """Greedy, seeded, with penalties, and with an output format."""
    loaded = Engine(write_checkpoint(tmp_path, num_hidden_layers=2), **OPTIONS)._loaded
    runner = OneDevice(loaded.runner, LOSSES)
    assert tokens_of(replace(loaded, runner=runner), flights=2) == tokens_of(loaded, flights=1)
    assert runner.reforms == len(LOSSES)


def test_a_rank_that_is_lost_while_memory_is_short_is_met_again(tmp_path):
    loaded = Engine(write_checkpoint(tmp_path, num_hidden_layers=2), **OPTIONS)._loaded
    runner = LosesWhileShort(loaded.runner, LOSSES)
    assert tokens_of(replace(loaded, runner=runner), flights=2) == tokens_of(loaded, flights=1)
    assert runner.reforms == len(LOSSES)
