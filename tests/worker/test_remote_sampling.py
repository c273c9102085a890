"""Tokens that another process draws are those that this one would sample."""

import random
from types import SimpleNamespace

import pytest
import torch

from moe_worker.mesh.messages import CODEC, Compute, Piece
from moe_worker.mesh.results import Wanted, checked, drawn
from moe_worker.mesh.runner import MeshRunner
from moe_worker.sampling.drawer import Drawer
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.sampling.remote import FAILED, Draw
from moe_worker.sampling.sampler import Sampler, with_drawn

CPU, VOCABULARY, STEPS = torch.device("cpu"), 600, 40
SAMPLINGS = (
    SamplingParameters(),
    SamplingParameters(temperature=0.8),
    SamplingParameters(temperature=1.5, top_k=40, top_p=0.9),
    SamplingParameters(temperature=1.0, top_p=0.7, min_p=0.02),
    SamplingParameters(temperature=2.0, top_k=VOCABULARY),
)


def sampler_of(samplings, ends=()):
    sampler = Sampler(VOCABULARY, CPU, ends)
    for name, sampling in enumerate(samplings):
        sampler.admit(name, sampling, seed=2**64 - 1 - name, prompt=[1, 2], output=[3] * name)
    return sampler


def test_a_process_without_state_draws_what_the_sampler_samples():
    """In batches that change from step to step, as those of micro-batches and new requests do."""
    generator, choose = torch.Generator().manual_seed(0), random.Random(0)
    here, there, drawer = sampler_of(SAMPLINGS), sampler_of(SAMPLINGS), Drawer(VOCABULARY, CPU)
    for step in range(STEPS):
        names = [name for name in range(len(SAMPLINGS)) if step < STEPS // 2 or choose.random() < 0.5]
        logits = torch.randn(len(names), VOCABULARY, generator=generator) * 3
        found = drawer.tokens(logits, tuple(there.next_draw(name) for name in names))
        there.note_drawn(names)
        assert torch.equal(found, here.sample(logits, names).tokens_B)


def test_rows_without_a_token_are_told_apart():
    logits = torch.zeros(3, VOCABULARY)
    logits[0, 5], logits[1, 7], logits[2, 9] = 1, torch.nan, torch.inf
    sampler = sampler_of(SAMPLINGS[:3])
    found = Drawer(VOCABULARY, CPU).tokens(logits, tuple(map(sampler.next_draw, range(3))))
    assert found.tolist() == [5, FAILED, FAILED]


@pytest.mark.parametrize(
    "fields",
    [{"frequency_penalty": 0.1}, {"repetition_penalty": 1.1}, {"logit_bias": ((1, 1.0),)}, {"logprobs": 0}],
)
def test_what_needs_more_than_a_draw_stays(fields):
    assert sampler_of([SamplingParameters(**fields)]).next_draw(0) is None


def test_end_tokens_that_must_wait_keep_a_row_until_they_may_come():
    sampler = sampler_of([SamplingParameters(min_tokens=2)], ends=[4])
    for _ in range(2):
        assert sampler.next_draw(0) is None
        sampler.sample(torch.zeros(1, VOCABULARY), [0])
    assert sampler.next_draw(0).index == 2
    assert sampler_of([SamplingParameters(min_tokens=2)]).next_draw(0) is not None


def test_drawn_tokens_join_those_sampled_here():
    sampler = sampler_of([SamplingParameters(), SamplingParameters(logprobs=1)])
    logits = torch.zeros(2, VOCABULARY)
    logits[0, 8], logits[1, 9] = 1, 2
    here = sampler.sample(logits, [0, 1])
    joined = with_drawn(here, torch.tensor([3, FAILED]), [0, 2])
    assert joined.tokens_B.tolist() == [3, 8, 0, 9]
    assert joined.failed_B.tolist() == [False, False, True, False]
    assert list(joined.logprobs.listed()) == [3]
    alone = with_drawn(None, torch.tensor([FAILED, 3]), [0, 1])
    assert (alone.tokens_B.tolist(), alone.failed_B.tolist()) == ([0, 3], [True, False])


def test_what_is_no_token_fails_its_row_alone():
    sent = torch.tensor([0, FAILED, VOCABULARY - 1, VOCABULARY, 2**62, -(2**62)])
    assert checked(sent, VOCABULARY).tolist() == [0, FAILED, VOCABULARY - 1, FAILED, FAILED, FAILED]


def piece(shard, selected, draws):
    draw = Draw(1, 0, 0.0, 0, 1.0, 0.0) if draws else None
    return Piece((7,) * 4, 0, (0,), shard, tuple(selected), draw=draw)


PIECES = (
    piece(1, [3], True), piece(0, [1, 2, 3], True), piece(1, [], False), piece(0, [3], False),
    piece(1, [0, 3], False), piece(2, [3], True),
)  # fmt: skip


def test_a_message_carries_draws():
    step = Compute(PIECES)
    assert CODEC.decode(CODEC.encode(step)[4:]) == step


@pytest.mark.parametrize("own", [False, True])
def test_tokens_and_logits_of_all_shards_are_in_the_order_of_the_pieces(own):
    """The leader is rank 0; with `own` it is on the last stage, else that has the ranks 3 to 5."""
    scores = torch.arange(8.0).unsqueeze(1) + torch.zeros(8, 8)
    wanted = Wanted.of(PIECES)
    shards = [each.shard for each in PIECES for _ in each.selected]
    sent = {}
    for shard in range(3):
        mine = [each for each in PIECES if each.shard == shard]
        rows = [row for row, each in enumerate(shards) if each == shard]
        drawer = SimpleNamespace(tokens=lambda logits, _: logits[:, 0].long())
        sent[shard] = drawn(scores[rows], mine, drawer)
    runner = object.__new__(MeshRunner)
    runner._part = SimpleNamespace(vocabulary=8, logits_dtype=torch.float32, device=CPU)
    runner._last = 0 if own else 1
    runner.member = SimpleNamespace(shape=SimpleNamespace(expert=3), rank=0)
    waiting = {(0 if own else 3) + shard: [*result[::-1]] for shard, result in sent.items()}

    def receive(rank, into):
        while not (part := waiting[rank].pop(0)).shape[0]:
            pass  # nothing was sent
        return into.copy_(part)

    runner._receive_from = receive
    found = runner._collect(Compute(PIECES), sent[0] if own else None)
    assert found.tokens_D.tolist() == wanted.drawn == [0, 3, 7]
    assert found.logits_NV[:, 0].tolist() == wanted.kept == [1, 2, 4, 5, 6]
