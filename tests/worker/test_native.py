"""Forward passes on the CPU kernels against the plain torch model, which computes W4A8 by its own means."""

from dataclasses import replace

import pytest
import torch

from moe_worker.config.directory import read_checkpoint_config
from moe_worker.errors import SettingsError
from moe_worker.kernels.cpu import build, library
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.models.batch import Batch, Segment
from moe_worker.models.checkpoint import Placement, load_model
from moe_worker.models.deepseek import MoeBlock
from moe_worker.models.native import NativeModel
from moe_worker.models.runner import ModelRunner
from moe_worker.models.stage import Stage
from moe_worker.moe.dispatch import Received
from tests.checkpoints import write_checkpoint

try:
    VARIANTS = library.supported_variants()
except build.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


CPU = torch.device("cpu")
MODELS = {
    "plain": {},
    "no query rank": {"q_lora_rank": None},
    "odd sizes": {"hidden_size": 72, "moe_intermediate_size": 40, "v_head_dim": 12, "num_attention_heads": 3,
                  "num_key_value_heads": 3},
    "biased": {"attention_bias": True, "n_shared_experts": 2, "moe_intermediate_size": 128},
    "every expert": {"num_experts_per_tok": 8, "topk_group": 4},
    "one group": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def model(request, tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("native"), **MODELS[request.param])
    config = read_checkpoint_config(directory)
    placement = Placement(torch.float32, CPU, "w4a8")
    with torch.inference_mode():
        return load_model(directory, config, placement, 256, progress=False)


def new_cache(model, dtype=torch.float32):
    shape = CacheShape(model.config.num_hidden_layers, model.config.attention.cache_width, 16, dtype)
    return PagedCache.allocate(shape, 32, CPU)


def ours(native, segments, cache):
    batch = Batch.of(segments, cache)
    return native.next_logits(batch, cache, range(len(batch.tokens_T)))


def truth(model, segments, cache):
    with torch.inference_mode():
        return model.logits(model.forward(Batch.of(segments, cache), cache))


def text(count, seed):
    return torch.randint(2, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PAGES = [7, 3, 9, 1, 20]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_reference(model, variant):
    """Activations that stand at the edge of two integers round either way, and then so do others, layer after
    layer, and those of later tokens of the sequence; now and then a token changes one of its experts. Most
    sequences see nothing of it."""
    native = NativeModel.of(model, library.Kernels(variant, 2))
    caches = new_cache(model), new_cache(model)
    short = [Segment(text(8, page), 0, [page]) for page in range(21, 27)]
    passes = [
        [Segment(text(40, 1), 0, PAGES), *short],
        [Segment(text(1, 2), 40, PAGES), Segment(text(1, 3), 0, [5]), Segment(text(20, 4), 0, [11, 12])],
        [Segment(text(1, 5), 41, PAGES), *(Segment(text(1, page), 8, [page]) for page in range(21, 27))],
    ]
    for segments in passes:
        result, expected = ours(native, segments, caches[0]), truth(model, segments, caches[1])
        errors = (result - expected).abs().amax(dim=1) / expected.abs().max()
        assert errors.median() < 1e-5
        assert errors.max() < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_do_not_depend_on_chunks_company_or_threads(model, variant, dtype):
    """To the bit: one forward pass for a prompt, chunks of it together with another sequence, and token by
    token.
    """
    prompt, other = text(50, 1), text(30, 2)
    whole = NativeModel.of(model, library.Kernels(variant, 1))
    pieces = NativeModel.of(model, library.Kernels(variant, 2))
    expected = ours(whole, [Segment(prompt, 0, PAGES)], new_cache(model, dtype))
    cache, single = new_cache(model, dtype), new_cache(model, dtype)
    for start in range(0, 50, 10):
        beside = Segment(other[start // 10 : start // 10 + 1], start // 10, [15, 16])
        chunk = ours(pieces, [beside, Segment(prompt[start : start + 10], start, PAGES)], cache)
        assert torch.equal(chunk[1:], expected[start : start + 10])
    for position in range(50):
        alone = ours(pieces, [Segment(prompt[position : position + 1], position, PAGES)], single)
        assert torch.equal(alone[0], expected[position])


def test_each_of_several_caches_has_its_own_sequences(model):
    native, prompts = NativeModel.of(model, library.Kernels()), (text(20, 1), text(20, 2))
    caches, expected = (new_cache(model), new_cache(model)), []
    for prompt in prompts:
        expected.append(ours(native, [Segment(prompt, 0, PAGES)], new_cache(model))[-1:])
    for part in (slice(19), slice(19, 20)):
        parts = [Segment(prompt[part], part.start or 0, PAGES) for prompt in prompts]
        found = [ours(native, [each], cache)[-1:] for each, cache in zip(parts, caches, strict=True)]
    assert all(map(torch.equal, found, expected))


def test_experts_are_counted_as_the_reference_counts_them(model):
    """Every token passes every layer once; now and then rounding makes one choose another expert."""
    runner = ModelRunner(NativeModel.of(model, library.Kernels(threads=2)))
    caches = new_cache(model), new_cache(model)
    runner.logits(Batch.of([Segment(text(9, 1), 0, [30])], caches[0]), caches[0], [8])  # before both counters
    counter, expected = runner.expert_counter(), model.expert_counter()
    passes = [
        [Segment(text(40, 1), 0, PAGES)],
        [Segment(text(1, 2), 40, PAGES), Segment(text(20, 4), 0, [11, 12])],
    ]
    for segments in passes:
        batch = Batch.of(segments, caches[0])
        runner.logits(batch, caches[0], batch.last_rows)
        counter.count(len(batch.tokens_T))
        truth(model, segments, caches[1])
        expected.count(len(batch.tokens_T))
    (steps, ours_L), (true_steps, true_L) = counter.read(), expected.read()
    assert steps == true_steps == 2
    assert [layer for layer, _, _ in ours_L] == [layer for layer, _, _ in true_L]
    for (_, tokens, active), (_, true_tokens, true_active) in zip(ours_L, true_L, strict=True):
        assert sum(tokens) == sum(true_tokens)
        assert sum(abs(a - b) for a, b in zip(tokens, true_tokens, strict=True)) <= 6
        assert abs(active - true_active) <= 2


def test_greedy_text_goes_on_as_in_the_reference(model):
    """Where the reference's best token leads clearly, it is ours too."""
    native, caches = NativeModel.of(model, library.Kernels(threads=2)), (new_cache(model), new_cache(model))
    tokens, start, clear = text(8, 9), 0, 0
    for _ in range(40):
        segments = [Segment(tokens, start, PAGES)]
        result, expected = (
            ours(native, segments, caches[0])[-1],
            truth(model, segments, caches[1])[-1],
        )
        best = expected.topk(2).values
        if best[0] - best[1] > 0.1 * expected.abs().max():
            assert result.argmax() == expected.argmax()
            clear += 1
        start, tokens = start + len(tokens), [int(expected.argmax())]
    assert clear > 3


def test_other_attention_is_refused_by_name(model):
    class Stranger:
        class config:  # noqa: N801
            attention, architecture = None, "qwen3_moe"

    with pytest.raises(SettingsError, match="attention of qwen3_moe"):
        NativeModel.of(Stranger(), library.Kernels())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fused_call_computes_what_its_operations_compute(model, variant):
    """To the bit, the cache too: it is the same model."""
    fused = NativeModel.of(model, library.Kernels(variant, 2))
    single = replace(fused, fused=False)
    caches = new_cache(model, torch.bfloat16), new_cache(model, torch.bfloat16)
    beside = Segment(text(9, 2), 0, [11])
    for segments in ([Segment(text(40, 1), 0, PAGES)], [Segment([7], 40, PAGES), beside]):
        assert torch.equal(ours(fused, segments, caches[0]), ours(single, segments, caches[1]))
    assert torch.equal(torch.stack(caches[0].layers), torch.stack(caches[1].layers))


class Halves:
    """Computes experts of even and of odd ids apart, as two ranks would."""

    def scatter(self, x, experts, weights):
        parts = [experts.masked_fill(experts % 2 == rest, -1) for rest in (0, 1)]
        return Received(torch.cat((x, x)), torch.cat(parts), torch.cat((weights, weights)))

    def gather(self, out):
        return sum(out.chunk(2))


def test_experts_of_several_ranks_add_up(model):
    """Rounding of the two sums may move an activation to the next integer, as between two variants."""
    blocks = [
        replace(layer, block=replace(layer.block, dispatch=Halves()))
        if isinstance(layer.block, MoeBlock) else layer
        for layer in model.layers
    ]  # fmt: skip
    stage = replace(model.stage, dispatches={1: Halves()})
    whole, spread = (
        NativeModel.of(each, library.Kernels())
        for each in (model, replace(model, layers=blocks, stage=stage))
    )
    assert whole.fused
    assert not spread.fused
    segments = [Segment(text(40, 1), 0, PAGES)]
    expected, found = (ours(each, segments, new_cache(model)) for each in (whole, spread))
    assert ((found - expected).abs().amax(dim=1) / expected.abs().max()).median() < 1e-5


def test_a_stage_takes_and_gives_hidden_states(model):
    """Two stages of half the layers give the logits of the whole model, fused or one operation a call."""
    whole = NativeModel.of(model, library.Kernels(threads=1))
    count = len(whole.layers)
    stages = [
        replace(whole, layers=whole.layers[part.begin : part.end], stage=part, fused=fused)
        for part, fused in ((Stage(0, count // 2, count), True), (Stage(count // 2, count, count), False))
    ]
    cache = new_cache(model)
    segments = [Segment(text(20, 3), 0, PAGES)]
    batch, hidden = Batch.of(segments, cache), None
    for stage in stages:
        own = replace(cache, layers=cache.layers[stage.stage.begin : stage.stage.end])
        hidden = stage.forward(batch, own, hidden)
    assert torch.equal(whole.logits(hidden), ours(whole, segments, new_cache(model)))
