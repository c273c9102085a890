"""The engine on the Triton kernels, compared with the same model in plain float32 torch.

Run as tests/gpu/test_triton_kernels.py says. bf16 keeps 8 bits, so logits and, where two are close, tokens
differ; a token counts as right if plain float32 gives it nearly its best score.
"""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu_random import NO_TEXT, SMALL, config_of, random_model
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.requests import Request
from moe_worker.kernels.triton.packed import PackedSparse14
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.mesh.stage_prompts import StagePrompts
from moe_worker.models import cuda
from moe_worker.models.batch import Batch, Segment
from moe_worker.models.cuda_build import Sizes, prepare, unsupported
from moe_worker.models.cuda_layer import Products
from moe_worker.models.cuda_runner import CudaRunner
from moe_worker.models.runner import ModelRunner
from moe_worker.quant.formats import FORMATS
from moe_worker.sampling.parameters import SamplingParameters
from tests.gpu.device import DEVICE, INTERPRETED, multiply_in_e4m3, needs_device

pytestmark = needs_device
CONTEXT = 128
SHAPES = {
    "small": SMALL,
    "no query rank, greedy, softmax, no shared expert": SMALL
    | {"model_type": "deepseek_v2", "q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 0,
       "norm_topk_prob": False},
    "groups by their best": SMALL
    | {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    "whole groups": SMALL | {"hidden_size": 256, "intermediate_size": 384},
    "sizes that are padded": SMALL
    | {"kv_lora_rank": 96, "v_head_dim": 48, "qk_nope_head_dim": 24, "q_lora_rank": None,
       "moe_intermediate_size": 64},
    "heads of 48 values": SMALL  # as the example has them
    | {"v_head_dim": 48, "num_attention_heads": 4, "kv_lora_rank": 96, "q_lora_rank": None,
       "hidden_size": 320, "intermediate_size": 640, "moe_intermediate_size": 64, "n_shared_experts": 1},
}  # fmt: skip
TOLERANCE = {name: each.tolerance for name, each in FORMATS.items()}
# The interpreter takes seconds for a layer: a dense one and one with experts do.
FEW_LAYERS = SMALL | {"num_hidden_layers": 2} if INTERPRETED else SMALL


class Both:
    """A random model twice: over the kernels in bf16, and plain in float32 with the same weights."""

    def __init__(self, values, number_format, kv_dtype=torch.bfloat16):
        sequences, pages, page = 8, 40, 16
        self.config = config_of(values)
        with torch.inference_mode():
            model = random_model(values, number_format, CONTEXT, DEVICE)
            width = Sizes.of(self.config.latent).cache_width(self.config.latent)
            shape = CacheShape(self.config.num_hidden_layers, width, page, kv_dtype)
            self.cache = PagedCache.allocate(shape, pages, DEVICE)
            self.runner = CudaRunner(prepare(model, consume=True), self.cache, sequences, CONTEXT, 256)
            self.plain = ModelRunner(random_model(values, number_format, CONTEXT, DEVICE, torch.float32))
        self.loaded = LoadedModel(self.config, self.runner, NO_TEXT, self.cache, CONTEXT, number_format)

    @torch.inference_mode()
    def exact(self, tokens):
        """Float32 logits after each of `tokens`."""
        shape = CacheShape(
            self.config.num_hidden_layers, self.config.attention.cache_width, 16, torch.float32
        )
        scratch = PagedCache.allocate(shape, shape.pages_for(len(tokens)), DEVICE)
        batch = Batch.of([Segment(tokens, 0, range(scratch.pages))], scratch)
        return self.plain.logits(batch, scratch, range(len(tokens)))

    @torch.inference_mode()
    def kernels(self, segments, rows=None):
        batch = Batch.of(segments, self.cache)
        return (
            self.runner.logits(batch, self.cache, batch.last_rows if rows is None else rows).float().clone()
        )


def difference(actual, expected):
    """Of the median row: routing may tip over at single tokens, where two scores are nearly equal."""
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(errors.median())


def tokens_of(count, seed):
    return torch.randint(500, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("number_format", TOLERANCE)
@pytest.mark.parametrize("values", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_those_of_the_plain_model(values, number_format):
    if unsupported(config_of(values), number_format):
        pytest.skip("not for the kernels")
    both, tokens = Both(values, number_format), tokens_of(40, seed=1)
    actual = both.kernels([Segment(tokens, 0, [5, 9, 2])], rows=range(40))
    assert difference(actual, both.exact(tokens)) < TOLERANCE[number_format]


@pytest.mark.parametrize("products", [Products.GROUPS, Products.DENSE_GROUPS, Products.BF16])
def test_logits_of_sparse_layers_are_those_of_the_plain_model(products, monkeypatch):
    monkeypatch.setattr(cuda, "DENSE_TOKENS", 1 if products is Products.DENSE_GROUPS else 8192)
    monkeypatch.setattr(cuda, "WIDE_TOKENS_PACKED", 1 if products is Products.BF16 else 8192)
    both, tokens = Both(FEW_LAYERS | {"hidden_size": 256}, "s14"), tokens_of(20, seed=1)
    both.runner._model = replace(both.runner._model, e4m3=False)
    assert all(isinstance(layer.gate_up, PackedSparse14) for layer in both.runner._model.layers)
    assert both.runner._model.products(20) is products
    actual = both.kernels([Segment(tokens, 0, [5, 9])], rows=range(20))
    assert difference(actual, both.exact(tokens)) < TOLERANCE["w4a8"]


def test_scores_over_a_cache_in_fp8_stay_alike():
    both, tokens = Both(SMALL, "dense", torch.float8_e4m3fn), tokens_of(40, seed=3)
    both.kernels([Segment(tokens[:30], 0, [5, 9, 2])])
    actual = [both.kernels([Segment(tokens[at : at + 1], at, [5, 9, 2])])[0] for at in range(30, 33)]
    assert difference(torch.stack(actual), both.exact(tokens)[30:33]) < 0.2


@pytest.mark.parametrize("number_format", ["dense", "fp8", "w4a8"])
def test_wide_passes_are_narrow_ones(monkeypatch, number_format):
    both, tokens = Both(SMALL, number_format), tokens_of(40, seed=2)
    narrow = both.kernels([Segment(tokens, 0, [5, 9, 2])], rows=range(40))
    monkeypatch.setattr(cuda, "WIDE_TOKENS", 1)
    monkeypatch.setattr(cuda, "WIDE_TOKENS_PACKED", 1)
    both.runner._model = replace(both.runner._model, e4m3=False)
    wide = both.kernels([Segment(tokens, 0, [5, 9, 2])], rows=range(40))
    assert not torch.equal(narrow, wide)
    assert difference(wide, narrow) < 0.04


def test_large_passes_in_e4m3_are_nearly_narrow_ones(monkeypatch):
    multiply_in_e4m3(monkeypatch)
    both, tokens = Both(FEW_LAYERS, "w4a8"), tokens_of(40, seed=2)
    narrow = both.kernels([Segment(tokens, 0, [5, 9, 2])], rows=range(40))
    monkeypatch.setattr(cuda, "WIDE_TOKENS_E4M3", 1)
    wide = both.kernels([Segment(tokens, 0, [5, 9, 2])], rows=range(40))
    assert 0.005 < difference(wide, narrow) < 0.1


def test_only_int4_for_int8_activations_is_multiplied_in_e4m3(monkeypatch):
    multiply_in_e4m3(monkeypatch)
    with torch.inference_mode():
        prepared = {
            each: prepare(random_model(FEW_LAYERS, each, CONTEXT, DEVICE)).products(cuda.WIDE_TOKENS_E4M3)
            for each in ("dense", "fp8", "w4a16", "w4a8")
        }
    assert [name for name, products in prepared.items() if products is Products.E4M3] == ["w4a8"]


@pytest.mark.parametrize(
    ("shape", "number_format", "kv_dtype"),
    [
        ("small", "dense", torch.bfloat16),
        ("small", "w4a8", torch.bfloat16),
        ("small", "dense", torch.float8_e4m3fn),
        ("heads of 48 values", "w4a8", torch.bfloat16),
    ],
)
def test_contexts_are_expanded_as_queries_are_absorbed(monkeypatch, shape, number_format, kv_dtype):
    """A prompt, then its second chunk together with a stream."""
    both = Both(SHAPES[shape], number_format, kv_dtype)
    text, other = tokens_of(40, seed=5), tokens_of(12, seed=6)

    def passes():
        first = both.kernels([Segment(text[:25], 0, [5, 9, 2]), Segment(other[:11], 0, [7])], rows=range(36))
        chunks = [Segment(other[11:], 11, [7]), Segment(text[25:], 25, [5, 9, 2])]
        return torch.cat((first, both.kernels(chunks, rows=range(16))))

    absorbed = passes()
    monkeypatch.setattr(cuda, "EXPANDED_LAUNCHES", -math.inf)
    expanded = passes()
    assert not torch.equal(absorbed, expanded)
    assert difference(expanded, absorbed) < 0.04


@pytest.mark.parametrize(
    ("shape", "number_format"),
    [("small", "dense"), ("small", "fp8"), ("small", "w4a8"), ("whole groups", "w4a8")],
    ids=["dense", "fp8", "w4a8", "whole"],
)
def test_decode_goes_on_where_prompts_ended(shape, number_format):
    """Chunked prompts, mixed steps, then steps of batches that grow and shrink over captured sizes.

    The kernels for few tokens take whole groups of inputs alone.
    """
    both = Both(SHAPES[shape], number_format)
    some, most = (6, 9) if INTERPRETED else (17, 28)  # the interpreter takes a second for few tokens
    texts = [tokens_of(most + 2, seed=number) for number in range(8)]
    pages = [[3 * number, 3 * number + 1] for number in range(8)]
    both.kernels([Segment(text[:some], 0, own) for text, own in zip(texts, pages, strict=True)])
    both.kernels(
        [Segment(texts[0][some : some + 1], some, pages[0]), Segment(texts[1][some:most], some, pages[1])]
    )
    both.kernels(
        [Segment(texts[0][some + 1 : most], some + 1, pages[0]), Segment(texts[2][some:most], some, pages[2])]
    )
    lengths, rows, expected = [most] * 3 + [some] * 5, [], []
    for members in (range(8), (2, 4), (5, 3, 6, 7)):
        rows.append(
            both.kernels([Segment(texts[n][(at := lengths[n]) : at + 1], at, pages[n]) for n in members])
        )
        for n in members:
            lengths[n] += 1
            expected.append(both.exact(texts[n][: lengths[n]])[-1])
    assert difference(torch.cat(rows), torch.stack(expected)) < TOLERANCE[number_format]


@pytest.mark.parametrize(
    ("shape", "number_format", "expands"),
    [("small", "w4a8", False), ("small", "w4a8", True), ("small", "dense", True),
     ("heads of 48 values", "w4a8", True)],
)  # fmt: skip
def test_captured_passes_with_prompts_are_those_launched_one_by_one(
    monkeypatch, shape, number_format, expands
):
    """Prompts, then a chunk of one and another one together with a stream; each size runs three times."""
    monkeypatch.setattr(cuda, "EXPANDED_LAUNCHES", -math.inf if expands else math.inf)
    # The interpreter takes seconds for the 16 tokens of the smallest pass.
    few = {"num_hidden_layers": 1, "first_k_dense_replace": 0} if INTERPRETED else {}
    some, most, last = (6, 12, 7) if INTERPRETED else (33, 40, 40)
    both, texts = Both(SHAPES[shape] | few, number_format), [tokens_of(most, seed=n) for n in range(3)]
    pages = [5, 9, 2], [7, 1, 3], [4, 8, 11]

    def passes():
        first = [Segment(texts[0][:some], 0, pages[0]), Segment(texts[1][:5], 0, pages[1])]
        mixed = [Segment(texts[1][5:6], 5, pages[1]), Segment(texts[0][some:], some, pages[0])]
        mixed += [Segment(texts[2][:last], 0, pages[2])]
        return torch.cat([both.kernels(first), both.kernels(mixed)])

    prompts, sizes = both.runner.prompts, []
    run = prompts.run
    monkeypatch.setattr(prompts, "run", lambda size: (sizes.append(size), run(size)))
    captured = [passes() for _ in range(1 if INTERPRETED else 3)]
    assert {(bool(size.positions), bool(size.singles)) for size in sizes[:2]} == (
        {(True, False), (True, True)} if expands else {(False, False)}
    )
    monkeypatch.setattr(prompts, "size", lambda batch, rows: None)
    apart = passes()
    for each in captured:
        assert difference(each, apart) < 0.02
        assert ((each - apart).norm(dim=-1) < apart.norm(dim=-1) / 2).all()  # those of another token are not
        assert torch.equal(each, captured[-1])


def test_experts_are_counted_without_padding_and_shared_ones():
    both = Both(FEW_LAYERS, "dense")
    steps = 1 if INTERPRETED else 2  # the second one replays a graph
    counter = both.runner.expert_counter()
    both.kernels([Segment(tokens_of(11, seed=0), 0, [0])])
    counter.count(11)
    for _ in range(steps):
        both.kernels([Segment([7], 11, [0]), Segment([9], 0, [1]), Segment([8], 0, [2])])
        counter.count(3)
    passes, layers = counter.read()
    assert passes == 1 + steps
    assert [layer for layer, _, _ in layers] == list(range(1, both.config.num_hidden_layers))
    for _, tokens, active in layers:
        assert len(tokens) == 20
        assert sum(tokens) == (11 + 3 * steps) * 3
        assert 3 * passes <= active <= 20 * passes


def test_memory_that_nobody_wrote_reaches_no_logits():
    """torch fills what it allocates with NaN here; a prompt of 5 is padded to 16, three streams to 4."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        both = Both(FEW_LAYERS, "w4a8")
        assert both.kernels([Segment(tokens_of(5, seed=0), 0, [3])]).isfinite().all()
        both.kernels([Segment([7], 0, [0]), Segment([9], 0, [1]), Segment([8], 0, [2])])
    finally:
        torch.use_deterministic_algorithms(False)
    assert both.runner.graphs.logits_BV[:4].isfinite().all()


class WholeStage:
    """What prompts of a rank need of a stage that has all layers."""

    def __init__(self, model):
        self._model, self.hidden, self.dtype = model, model.embedding_VD.shape[1], torch.bfloat16

    def capacity(self, tokens):
        return tokens

    def forward(self, tokens_T, shared, cache, x_TD):
        x_TD, self._added = self._model.forward(tokens_T, shared, cache.layers, x_TD)
        return x_TD

    def finish(self, x_TD, rows_n, out_nV):
        self._model.logits(x_TD[rows_n], self._added.of_tokens(rows_n, x_TD.shape[0]), out_nV)

    def all_have(self, own):
        return own


@pytest.mark.skipif(INTERPRETED, reason="the interpreter captures nothing")
@torch.inference_mode()
def test_a_rank_that_has_met_others_again_captures_its_prompts_again():
    both = Both(SMALL, "w4a8")
    model, graphs = both.runner._model, both.runner.graphs
    prompts = StagePrompts(model, graphs, CONTEXT, 256, WholeStage(model), first=True, last=True)
    batch, found = Batch.of([Segment(tokens_of(40, seed=1), 0, [5, 9, 2])], both.cache), []
    for _ in range(2):
        for _ in range(2):  # the second time the graph is launched
            size = prompts.size(batch, [39])
            prompts.take(batch, [39], size, None)
            prompts.run(size)
            found.append(graphs.logits_BV[:1].clone())
        assert list(prompts._graphs) == [size]
        prompts.forget()
    assert all(torch.equal(each, found[0]) for each in found)
    assert torch.equal(found[0].float(), both.kernels(batch.segments))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("number_format", ["dense", "fp8", "w4a8"])
def test_nothing_is_compiled_once_it_is_ready(monkeypatch, number_format):
    """Prompts of every length up to 64, in chunks and together with streams."""
    both, compiled = Both(SMALL, number_format), []

    def note(**given):
        compiled.append(given["fn"].name)

    monkeypatch.setattr("triton.knobs.runtime.jit_cache_hook", note)
    for options in (
        {"prefill_tokens": 256},
        {"prefill_tokens": 7},
        {"prefix_cache": False, "prefill_tokens": 256},
    ):
        generate(both, [tokens_of(count, seed=count) for count in range(1, 65)], 3, max_queue=64, **options)
    assert compiled == []


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_log_probabilities_wait_for_no_later_step():
    """CUDA itself raises where the host would wait for anything but the step's own event."""
    both = Both(SMALL, "dense")
    core = EngineCore(both.loaded, EngineOptions(max_batch_size=8), flights=2)
    sampling = SamplingParameters(max_tokens=12, ignore_eos=True, logprobs=5)
    for number in range(3):
        core.submit(Request(number, tuple(tokens_of(9, seed=number)), sampling, 0))
    while not core._flights:
        core.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        deltas = [delta for _ in range(6) for delta in core.step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert any(delta.logprobs and len(delta.logprobs.top) == 5 for delta in deltas)


def generate(both, prompts, tokens, **options):
    settings = EngineOptions(**{"max_batch_size": 8} | options)
    core = EngineCore(both.loaded, settings, flights=2)
    for number, prompt in enumerate(prompts):
        core.submit(Request(number, tuple(prompt), SamplingParameters(max_tokens=tokens, ignore_eos=True), 0))
    found = [[] for _ in prompts]
    while not core.idle:
        for delta in core.step():
            found[delta.id].append(delta.token)
    assert core.load.kv_tokens_used == 0
    return found


@pytest.mark.parametrize("options", [{}, {"prefill_tokens": 7}, {"prefix_cache": False}], ids=str)
def test_generated_tokens_are_nearly_the_likeliest(options):
    both = Both(SMALL, "dense")
    prompts = [tokens_of(count, seed=count) for count in (3, 20, 33, 20)]
    wanted, short = 4 if INTERPRETED else 24, []
    for prompt, tokens in zip(prompts, generate(both, prompts, wanted, **options), strict=True):
        assert len(tokens) == wanted
        scores = both.exact([*prompt, *tokens])[len(prompt) - 1 : -1]
        short.append((scores.max(dim=-1).values - scores[range(wanted), tokens]) / scores.std())
    # Where routing tips over, a token may be far off; a token at random is some 2.5 deviations short.
    assert (torch.cat(short) < 0.5).float().mean() > 0.8
