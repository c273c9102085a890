"""What a step of the engine gives to the device: its arrays, and how few operators they take."""

import argparse
import contextlib
import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.engine_step import engine, operators
from moe_worker.kernels.likeliest import likeliest
from moe_worker.kernels.transfer import Staging
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.mesh.messages import Piece
from moe_worker.mesh.runner import _width
from moe_worker.models.batch import Batch, Extent, Fed, Segment
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


@settings(max_examples=25)
@given(st.lists(SINGLE, max_size=4), st.lists(LONG, max_size=3), st.booleans(), st.data())
def test_a_captured_pass_gets_its_prompts_and_padding_that_belongs_to_nobody(single, long, expands, data):
    graphs = graphs_of(9, 96)
    from moe_worker.models.cuda_prompts import PromptGraphs  # noqa: PLC0415 - triton is not everywhere

    graphs._model.saved_by_expanding = lambda counts, *_: float(expands and len(counts) > 0)
    prompts, segments = PromptGraphs(graphs._model, graphs, 96, 60), single + long
    for batch in (Batch.of([segment([7] * 20, 3, 1)] * 2, CACHE), Batch.of(segments, CACHE)):
        count, begins = len(batch.tokens), [0, *(row + 1 for row in batch.last_rows)]
        rows = sorted(data.draw(st.sets(st.sampled_from(range(max(1, count))), max_size=9)))
        size = prompts.size(batch, rows)
        assert size.tokens == min(each for each in prompts.sizes if each >= count)
        prompts.fill(batch, rows, size)
    tokens_T, positions_T, rows_T, wanted_N, single_positions_B, single_rows_B = prompts._inputs_6T
    for filled, expected, padding in (
        (tokens_T, batch.tokens, 0), (positions_T, batch.positions, 0), (rows_T, batch.rows, PAGES * PAGE),
        (wanted_N, rows, 0),
    ):  # fmt: skip
        assert filled.tolist() == [*expected, *[padding] * (len(filled) - len(expected))]
    apart = len(single) if size.positions else 0
    assert apart <= size.singles <= size.tokens if size.positions else not size.singles
    assert single_positions_B.tolist()[: size.singles] == [
        *(each.start for each in single[:apart]), *[0] * (size.singles - apart)
    ]  # fmt: skip
    assert (single_rows_B[apart : size.singles] == PAGES * PAGE).all()
    sequence_C, first_C, count_C, firsts, valid = prompts._layout_5C
    tiles = min(size.tokens, size.tokens // prompts._tile(size) + 10)
    assert not count_C[tiles:].any()
    covered = []
    for sequence, first, own in zip(sequence_C.tolist(), first_C.tolist(), count_C.tolist(), strict=True):
        covered += range(first, first + own)
        assert own <= prompts._tile(size)
        assert not own or first >= count or begins[sequence] <= first <= first + own <= begins[sequence + 1]
    assert sorted(covered) == list(range(begins[apart], size.tokens))
    lengths = [0] * apart + [each.end for each in segments[apart:]]
    assert np.diff(firsts[:10]).tolist() == lengths + [0] * (9 - len(lengths))
    assert not size.positions or max(sum(lengths), size.tokens) <= size.positions
    assert valid[0] == count
    assert torch.equal(prompts._pages_BP[: len(segments), : batch.pages.shape[1]], batch.pages_BP)


@dataclass(frozen=True)
class Shared:
    """Of a pass; see Pass."""

    valid: torch.Tensor
    capacity: int = 0


def test_ranks_exchange_equally_many_tokens_whatever_their_shards_have():
    """Those of the largest shard decide; hidden states behind a rank's own are zeros."""
    graphs, seen = graphs_of(9, 96), []
    from moe_worker.mesh.stage_prompts import StagePrompts  # noqa: PLC0415 - triton is not everywhere

    graphs._model.saved_by_expanding = lambda *_: 0.0
    graphs._model.absorbed_pass = lambda rows, cut, page, valid: Shared(valid)

    def forward(ids_T, shared, cache, x_TD):
        seen.append((len(ids_T), int(shared.valid), shared.capacity, x_TD.sum().item()))
        return x_TD

    part = SimpleNamespace(
        hidden=4, dtype=torch.float32, capacity=lambda tokens: tokens // 2, forward=forward,
        finish=lambda *_: None,
    )  # fmt: skip
    for tokens in (11, 3, 0):
        prompts = StagePrompts(graphs._model, graphs, 96, 60, part, first=False, last=True)
        prompts.x_TD.fill_(7)
        batch = Batch.of([segment([1] * tokens, 0, 1)] if tokens else [], CACHE)
        size = prompts.size_for([Extent.of([11], [11], 1), Extent.of([tokens] if tokens else [], [1], 0)])
        prompts.take(batch, [], size, torch.ones(max(tokens, 1), 4) if tokens else torch.zeros(0, 4))
        prompts.run(size)
        prompts.run_with_room(size)
        assert seen[-2:] == [(16, tokens, 8, tokens * 4), (16, tokens, 16, tokens * 4)]
    assert prompts.tokens_for(1000) == 1000


@pytest.mark.parametrize(("fails", "others", "kept"), [(False, True, 1), (False, False, 0), (True, True, 0)])
def test_a_rank_keeps_a_graph_of_prompts_only_where_all_ranks_have_it(monkeypatch, fails, others, kept):
    """NCCL wants an operation in one graph of all ranks, or in none; then no rank records another one."""
    graphs = graphs_of(9, 96)
    from moe_worker.mesh.stage_prompts import StagePrompts  # noqa: PLC0415 - triton is not everywhere
    from moe_worker.models import cuda_prompts  # noqa: PLC0415
    from moe_worker.models.cuda_prompts import Size  # noqa: PLC0415

    graphs._model.saved_by_expanding = lambda *_: 0.0
    graphs._model.absorbed_pass = lambda rows, cut, page, valid: Shared(valid)
    asked, replayed = [], []

    def all_have(own):
        asked.append(own)
        return own and others

    def captured(step, *_):
        step()
        if fails:
            raise torch.OutOfMemoryError("too little")
        return SimpleNamespace(replay=lambda: replayed.append(1))

    monkeypatch.setattr(cuda_prompts, "captured", captured)
    monkeypatch.setattr(StagePrompts, "_new_pool", lambda _: object())
    part = SimpleNamespace(
        hidden=4, dtype=torch.float32, capacity=lambda tokens: tokens, forward=lambda *given: given[-1],
        finish=lambda *_: None, all_have=all_have,
    )  # fmt: skip
    prompts = StagePrompts(graphs._model, graphs, 96, 60, part, first=False, last=True)
    monkeypatch.setattr(StagePrompts, "_step", lambda *_: None)
    extents = [Extent.of([11], [11], 1)]
    for _ in range(2):
        prompts.run(prompts.size_for(extents) or Size(16))
    assert asked == [not fails]
    assert len(prompts._graphs) == len(replayed) == kept
    assert (prompts.size_for([Extent.of([40], [40], 1)]) is not None) == bool(kept)
    pool = prompts._pool
    prompts.forget()
    assert prompts.size_for(extents) == Size(16)
    assert prompts._pool is not pool  # a capture into one without graphs fails


@settings(max_examples=25)
@given(st.lists(st.tuples(st.lists(SINGLE, max_size=4), st.lists(LONG, max_size=3)), min_size=2, max_size=3))
def test_ranks_run_the_same_graph_which_has_room_for_each(shards):
    """NCCL wants an operation in one graph of all ranks, or in none."""
    graphs = graphs_of(9, 96)
    from moe_worker.models.cuda_prompts import PromptGraphs  # noqa: PLC0415 - triton is not everywhere

    graphs._model.saved_by_expanding = lambda counts, lengths, _: sum(lengths) - 60.0
    prompts = PromptGraphs(graphs._model, graphs, 96, 60)
    pieces = [
        Piece(tuple(each.tokens), each.start, tuple(each.pages), shard, (0,))
        for shard, (single, long) in enumerate(shards)
        for each in single + long
    ]
    extents = _width(pieces, len(shards)).extents
    size = prompts.size_for(extents)
    for (single, long), extent in zip(shards, extents, strict=True):
        batch = Batch.of(single + long, CACHE)
        own = prompts.size_for([extent])
        assert own == prompts.size(batch, range(len(batch.segments)))
        assert all(wanted <= room for wanted, room in zip(own, size, strict=True))
        if size.positions:
            assert sum(each.end for each in batch.segments[batch.decodes :]) <= size.positions
            assert batch.decodes <= size.singles
        prompts.fill(batch, [], size)


def test_passes_have_few_sizes_and_none_where_they_are_large():
    graphs = graphs_of(9, 96)
    from moe_worker.models.cuda_prompts import PromptGraphs, Size  # noqa: PLC0415 - triton is not everywhere

    saved_ns = [1.0]
    graphs._model.saved_by_expanding = lambda counts, *_: saved_ns[0] if sum(counts) >= 256 else -1.0
    graphs._model.expands = lambda counts, _: sum(counts) >= 256
    prompts = PromptGraphs(graphs._model, graphs, 96, 16_384)
    assert prompts.sizes[-1] == 2048 + 9
    assert all(b <= 2 * a for a, b in itertools.pairwise(prompts.sizes))
    long = PromptGraphs(graphs._model, graphs, 100_000, 16_384)
    for each, most in ((prompts, 40), (long, 70)):
        assert len(set(each.usual_sizes())) == len(each.usual_sizes()) <= most
    few, many = Batch.of([segment([7] * 20, 3, 1)], CACHE), Batch.of([segment([7], 3, 1)] * 10, CACHE)
    assert prompts.size(few, [19]) is not None
    assert prompts.size(few, range(10)) is prompts.size(many, [0]) is None
    assert prompts.size(Batch.of([Segment([7] * 2058, 0, [0] * 258)], CACHE), [0]) is None
    prompts._close(torch.OutOfMemoryError("too little"))
    assert prompts.size(few, [19]) is None
    long = Batch.of([segment([7] * 300, 3, 1)._replace(pages=range(40))], CACHE)
    for recorded in (Size(384), Size(384, 2048, 9), Size(384, 2048), Size(512, 512), Size(384, 4096)):
        prompts._graphs[recorded] = None
    assert prompts.size(long, [299]) == Size(384, 2048)  # the cheapest that has room
    del prompts._graphs[Size(384, 2048)], prompts._graphs[Size(384, 2048, 9)]
    assert prompts.size(long, [299]) == Size(384)  # without a graph for expanded contexts of this size
    saved_ns[0] = 1e9
    assert prompts.size(long, [299]) is None


def test_graphs_that_find_no_memory_are_told_once(caplog):
    """At the start each size is tried, although memory is too short for dozens of them."""
    graphs = graphs_of(9, 96)
    from moe_worker.models.cuda_prompts import PromptGraphs  # noqa: PLC0415 - triton is not everywhere

    prompts = PromptGraphs(graphs._model, graphs, 96, 60)
    for size in (512, 384, 256):
        prompts._open = True
        prompts._close(torch.OutOfMemoryError(f"no memory for {size}"))
    assert [record.getMessage() for record in caplog.records] == [
        "some steps with prompts are launched kernel by kernel, without a graph: no memory for 512"
    ]


def test_a_capture_that_cannot_end_raises_the_error_of_its_step_on_the_stream_of_before(monkeypatch):
    """torch's context manager then raises another error, and leaves its own stream current."""
    pytest.importorskip("triton")
    from moe_worker.models.cuda_graph import captured  # noqa: PLC0415 - triton is not everywhere

    streams = ["usual"]

    @contextlib.contextmanager
    def stream(named):
        before, streams[0] = streams[0], named
        try:
            yield
        finally:
            streams[0] = before

    @contextlib.contextmanager
    def graph(*_, **__):
        streams[0] = "of the capture"
        try:
            yield
        except ValueError:
            raise RuntimeError("operation failed due to a previous error during capture") from None
        streams[0] = "usual"

    fakes = {"CUDAGraph": object, "current_stream": lambda: streams[0], "stream": stream, "graph": graph}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def step():
        raise ValueError("a rank is lost")

    with pytest.raises(ValueError, match="a rank is lost"):
        captured(step, None, "global")
    assert streams == ["usual"]


def test_a_step_without_memory_for_its_graph_is_launched_and_ends_recording(monkeypatch, caplog):
    graphs = graphs_of(9, 96)
    from moe_worker.models.cuda_prompts import PromptGraphs, Size  # noqa: PLC0415 - triton is not everywhere

    def fails(*_, **__):
        raise torch.OutOfMemoryError("too little for a graph")

    for name, fake in (("CUDAGraph", object), ("current_stream", object), ("graph", fails)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    prompts, steps = PromptGraphs(graphs._model, graphs, 96, 60), []
    prompts._pool = object()
    monkeypatch.setattr(prompts, "_step", lambda size: (steps.append(size), likeliest(torch.eye(9)))[1])
    for _ in range(2):
        prompts.run(Size(32))
    assert steps == [Size(32)] * 2
    assert prompts.likeliest(3).tokens_B.tolist() == [0, 1, 2]
    assert ["too little" in record.message for record in caplog.records] == [True]


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
