"""What a step of the engine gives to the device: its arrays, and how few operators they take."""

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.engine_step import engine, operators
from moe_worker.kernels.likeliest import likeliest
from moe_worker.kernels.transfer import Staging
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.models.batch import Batch, Fed, Segment
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.sampling.sampler import Sampler

CPU = torch.device("cpu")
PAGE, PAGES = 8, 30
CACHE = PagedCache.allocate(CacheShape(1, 1, PAGE, torch.float32), PAGES, CPU)


def segment(tokens, start, seed):
    """With more pages than it needs, in any order."""
    pages = np.random.default_rng(seed).permutation(PAGES)[: (start + len(tokens)) // PAGE + 2]
    return Segment(tokens, start, pages.tolist())


SINGLE = st.builds(
    segment, st.lists(st.integers(0, 99), min_size=1, max_size=1), st.integers(0, 60), st.integers(0, 9)
)
LONG = st.builds(
    segment, st.lists(st.integers(0, 99), min_size=2, max_size=20), st.integers(0, 40), st.integers(0, 9)
)


@given(st.lists(SINGLE, max_size=4), st.lists(LONG, max_size=3))
def test_a_batch_says_where_each_token_goes(single, long):
    segments = single + long
    batch = Batch.of(segments, CACHE)
    positions = [each.start + at for each in segments for at in range(each.size)]
    pages = [each.pages[(each.start + at) // PAGE] for each in segments for at in range(each.size)]
    assert batch.tokens_T.tolist() == [token for each in segments for token in each.tokens]
    assert batch.positions_T.tolist() == positions
    expected = [page * PAGE + at % PAGE for page, at in zip(pages, positions, strict=True)]
    assert batch.rows_T.tolist() == expected
    assert batch.lengths_B.tolist() == [each.end for each in segments]
    for row, each in zip(batch.pages_BP.tolist(), segments, strict=True):
        assert row == [*each.pages, *[0] * (len(row) - len(each.pages))]
    assert batch.decodes == len(single)
    assert batch.starts.tolist() == [0, *(last + 1 for last in batch.last_rows)]
    assert batch.starts[-1] == len(positions)
    kinds = {batch.tokens_T.dtype, batch.positions_T.dtype, batch.rows_T.dtype}
    assert (kinds, batch.pages_BP.dtype, batch.lengths_B.dtype) == ({torch.int64}, torch.int32, torch.int32)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1]])
def test_tokens_that_only_the_device_knows_take_their_places(rows):
    sampled_N = torch.tensor([70, 71, 72])
    places = list(range(len(rows)))
    segments = [segment([-1], 9, 0), segment([-1], 9, 1), segment([-1], 9, 2)]
    batch = Batch.of(segments, CACHE, [Fed(sampled_N, rows, places)])
    assert batch.tokens_T.tolist() == [70 + row for row in rows] + [-1] * (3 - len(rows))


def test_a_buffer_is_not_filled_while_the_one_before_it_may_be_copied():
    into = torch.zeros(3, dtype=torch.int64)
    staging, before = Staging(into), None
    for value in (5, 6, 7):
        buffer = staging.buffer()
        assert before is None or not np.shares_memory(buffer, before)
        buffer[:] = value
        staging.copy()
        assert into.tolist() == [value] * 3
        before = buffer


def graphs_of(largest, context):
    """The buffers of captured steps, whose model computes nothing."""
    pytest.importorskip("triton")
    from moe_worker.models.cuda_graph import DecodeGraphs  # noqa: PLC0415 - triton is not everywhere

    model = SimpleNamespace(
        device=CPU, counts_LA=torch.zeros(1, 1, dtype=torch.int32), empty_logits=lambda n: torch.zeros(n, 4),
        layers=(SimpleNamespace(router_ED=None),),
    )  # fmt: skip
    return DecodeGraphs(model, CACHE, largest, context)


def test_a_captured_step_gets_its_batch_and_padding_that_belongs_to_nobody():
    graphs = graphs_of(9, 96)
    sizes = [9, 3, 1, 8, 8, 5]
    for step, count in enumerate(sizes):
        segments = [segment([step], 7 * n + step, n + step // 2) for n in range(count)]
        fed = [Fed(torch.tensor([90, 91]), [1], [0])] if step == 2 else []
        size = graphs.fill(Batch.of(segments, CACHE, fed))
        expected = Batch.of(segments, CACHE, fed)
        assert size == min(each for each in graphs.sizes if each >= count)
        assert torch.equal(graphs._tokens_B[:count], expected.tokens_T)
        assert torch.equal(graphs._positions_B[:count], expected.positions_T)
        assert torch.equal(graphs._rows_B[:count], expected.rows_T)
        assert torch.equal(graphs._pages_BP[:count, : expected.pages_BP.shape[1]], expected.pages_BP)
        assert graphs._valid.tolist() == [count]
        assert (graphs._rows_B[count:] == PAGES * PAGE).all()
        assert (graphs._positions_B[count:] == 0).all()
        assert (graphs._pages_BP[count:size, 0] == PAGES).all()
        assert np.array_equal(graphs._sent_BP, graphs._pages_BP.numpy())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_known_tokens_are_taken_where_nothing_changes_the_scores(temperature):
    torch.manual_seed(0)
    logits_BV = torch.randn(3, 50)
    found = []
    for known in (None, likeliest(logits_BV)):
        sampler = Sampler(50, CPU, [])
        for name in range(3):
            sampler.admit(name, SamplingParameters(temperature=temperature), name, [1])
        sampled = sampler.sample(logits_BV, range(3), None, known)
        found.append(sampled.tokens_B.tolist())
        if known is not None:  # the next step overwrites it
            known.tokens_B.fill_(49)
            assert sampled.tokens_B.tolist() == found[0]
    assert found[0] == found[1]


def test_known_tokens_are_not_taken_where_a_bias_changes_the_scores():
    logits_BV = torch.zeros(1, 8)
    sampler = Sampler(8, CPU, [])
    sampler.admit(0, SamplingParameters(logit_bias=((5, 9.0),)), 0, [1])
    assert sampler.sample(logits_BV, [0], None, likeliest(logits_BV)).tokens_B.tolist() == [5]


@pytest.mark.parametrize(("graphs", "most"), [(False, 5), (True, 3.6)])
def test_a_decode_step_calls_few_operators_whatever_its_batch(graphs, most):
    """On a GPU each is a launch. Where a step is captured, some steps also copy a page table."""
    if graphs:
        pytest.importorskip("triton")
    args = argparse.Namespace(graphs=graphs, steps=20, temperature=0.0)
    assert max(operators(engine(batch, args), 16) for batch in (1, 9)) <= most
