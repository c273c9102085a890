"""What loading decides about a GPU, without one: whether the kernels take a model, and whether it fits."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu_random import LARGE, SMALL, config_of, random_model
from moe_worker.config.directory import find_checkpoint, read_checkpoint_config
from moe_worker.config.engine import EngineOptions
from moe_worker.config.quantization import Fp8Storage, PackedStorage, SparseStorage
from moe_worker.engine import gpu, loading
from moe_worker.engine.loading import load
from moe_worker.errors import DeviceMemoryError, SettingsError
from moe_worker.kernels import registry
from moe_worker.kernels.registry import Hardware, explain
from moe_worker.kernels.transfer import make_current
from moe_worker.kvcache.paged import CacheShape, PagedCache

pytest.importorskip("triton")
from moe_worker.mesh import cuda_stage
from moe_worker.models import cuda_build, cuda_runner
from moe_worker.models.cuda_build import prepare
from moe_worker.models.cuda_graph import batch_sizes
from tests.compress.sparse import random_sparse

EXAMPLE = Path(__file__).parents[2] / "examples/docs-moe"
QWEN = {
    "model_type": "qwen3_moe", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96,
    "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 256,
}  # fmt: skip
ROWS = CacheShape(27, 576, 16, torch.bfloat16)
REFUSED = {
    "attention of qwen3_moe": (QWEN, "bf16"),
    "attention_bias to be false": (SMALL | {"attention_bias": True}, "bf16"),
    "qk_rope_head_dim to be 16, 32": (SMALL | {"qk_rope_head_dim": 8}, "bf16"),
    "hidden_size to be a multiple of 64": (SMALL | {"hidden_size": 96}, "bf16"),
    "v_head_dim of all heads to be a multiple of 64 in w4a8": (SMALL | {"v_head_dim": 48}, "w4a8"),
    "v_head_dim of all heads to be a multiple of 64 in fp8": (SMALL | {"v_head_dim": 48}, "fp8"),
    "dtype float32 was asked for": (SMALL, "fp32"),
}


@pytest.mark.parametrize(("reason", "case"), REFUSED.items(), ids=REFUSED)
def test_models_that_the_kernels_do_not_take_are_computed_by_the_reference(reason, case):
    values, number_format = case
    hardware = gpu.probe_gpu(config_of(values), number_format)
    assert hardware.kernels is None
    assert reason in hardware.reason
    assert registry.choose("pass", number_format, hardware).implementation == "reference"


@pytest.mark.parametrize("storage", [PackedStorage(128, symmetric=False), PackedStorage(32, symmetric=True)])
def test_four_bits_in_another_layout_are_said(storage):
    hardware = gpu.probe_gpu(replace(config_of(LARGE), storage=storage), "w4a16")
    assert hardware.kernels is None
    assert "symmetric int4 in groups of 128" in hardware.reason


@pytest.mark.parametrize(
    ("number_format", "experts"),
    [
        ("w4a8", "stay sparse; large passes make dense ones"),
        ("w4a16", "become dense when they load"),
        ("bf16", None),
    ],
)
def test_what_becomes_of_sparse_weights_is_explained(number_format, experts):
    config = replace(config_of(LARGE), storage=SparseStorage(128))
    said = explain(number_format, gpu.probe_gpu(config, number_format))
    lines = [line for line in said if "of 1:4 sparse weights" in line]
    assert all(": triton, " in line for line in said)
    if experts is None:
        assert not lines
    else:
        linear, of_experts = lines
        assert "linear_packed (weights become dense when they load)" in linear
        assert f"experts_packed (weights {experts})" in of_experts
    ranks = explain(number_format, replace(gpu.probe_gpu(config, number_format), ranks=2))
    assert not any("stay sparse" in line for line in ranks)
    plain = explain(number_format, gpu.probe_gpu(config_of(LARGE), number_format))
    assert not any("sparse" in line for line in plain)


@pytest.mark.parametrize("int8", [True, False])
def test_sparse_weights_are_those_of_the_same_dense_matrix(int8):
    sparse = random_sparse(5, 70, 192, group=128)
    actual = cuda_build._packed(sparse, int8)
    values = actual.stored.unsqueeze(-1) << torch.tensor([4, 0], dtype=torch.int8) >> 4
    whole = values.movedim(-1, -2).flatten(-2).float() * actual.scales.unsqueeze(-1)
    assert torch.equal(whole.transpose(1, 2).flatten(2)[..., :192], sparse.dequantize(torch.float32))
    assert actual.kind == ("w4a8" if int8 else "w4a16")


def test_ranks_that_share_experts_have_dense_ones():
    """They read each other's activations, in one order."""
    with torch.inference_mode():
        model = random_model(SMALL | {"hidden_size": 256}, "s14", 16, torch.device("cpu"))
        shared = prepare(model, exchange_of=lambda *_: object())
        alone = prepare(model)
    assert [type(layer.down).__name__ for layer in shared.layers] == [
        "PackedSparse14",
        "PackedInt4",
        "PackedInt4",
    ]
    assert {type(layer.down).__name__ for layer in alone.layers} == {"PackedSparse14"}


def test_sparse_weights_in_other_groups_are_said():
    hardware = gpu.probe_gpu(replace(config_of(LARGE), storage=SparseStorage(64)), "w4a8")
    assert hardware.kernels is None
    assert "1:4 sparse weights in groups of 128, not of 64" in hardware.reason


def test_fp8_in_other_blocks_is_said_where_it_is_to_be_multiplied_as_it_is():
    config = replace(config_of(LARGE), storage=Fp8Storage((128, 64)))
    assert "FP8 in blocks of 128 inputs; the checkpoint's have 64" in gpu.probe_gpu(config, "fp8").reason
    assert gpu.probe_gpu(config, "bf16").kernels == gpu.probe_gpu(config, "w4a8").kernels == "triton"


@pytest.mark.parametrize("number_format", ["bf16", "fp8", "w4a16", "w4a8"])
def test_models_of_published_sizes_run_on_the_kernels(number_format):
    hardware = gpu.probe_gpu(config_of(LARGE), number_format)
    for operation in registry.OPERATIONS:
        assert registry.choose(operation, number_format, hardware).implementation == "triton"


@pytest.mark.parametrize("number_format", ["bf16", "fp8", "w4a16", "w4a8"])
def test_the_example_runs_on_the_kernels(number_format):
    """Its heads have 48 values, which are no whole pieces of 64."""
    config = read_checkpoint_config(find_checkpoint(EXAMPLE))
    assert gpu.probe_gpu(config, number_format).kernels == "triton"


@pytest.mark.parametrize(
    ("number_format", "e4m3", "ranks", "experts", "reason"),
    [
        ("w4a8", True, 1, "kernels.triton.e4m3.experts_e4m3", "has them"),
        ("w4a8", False, 1, "kernels.triton.wide.experts_wide", "has them"),
        ("w4a8", True, 2, "kernels.triton.e4m3.experts_e4m3", "has them"),
        ("w4a16", True, 1, "kernels.triton.wide.experts_wide", "products in bf16"),
    ],
)
def test_how_large_passes_multiply_is_explained(number_format, e4m3, ranks, experts, reason):
    hardware = Hardware("cuda", "triton", "a GPU", ranks, e4m3, "has them")
    (line,) = (each for each in explain(number_format, hardware) if "experts of large passes" in each)
    assert line.startswith(f"{number_format} experts of large passes: triton, {experts} (")
    assert reason in line
    module, name = experts.rsplit(".", 1)
    assert callable(getattr(importlib.import_module(f"moe_worker.{module}"), name))


def test_a_machine_without_a_gpu_has_no_products_in_e4m3():
    hardware = gpu.probe_gpu(config_of(LARGE), "w4a8", torch.device("cpu"))
    assert not hardware.e4m3
    assert "no CUDA device" in hardware.e4m3_reason


class DeviceIsCurrentError(Exception):
    pass


def test_the_chosen_gpu_is_the_current_one_before_anything_is_put_there(monkeypatch):
    """Triton launches kernels on the current device, wherever their arguments are."""

    def stop(device):
        raise DeviceIsCurrentError(str(device))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", stop)
    with pytest.raises(DeviceIsCurrentError, match=r"^cuda:1$"):
        load(EXAMPLE, EngineOptions(device="cuda:1"), progress=False)


def test_a_gpu_without_a_number_is_the_current_one_already():
    make_current(torch.device("cuda"))
    make_current(torch.device("cpu"))


def stored_bytes(model):
    """Of all weights of a model that was built."""
    seen, todo = {}, [model]
    while todo:
        each = todo.pop()
        if isinstance(each, torch.Tensor):
            seen[each.data_ptr()] = max(each.nbytes, seen.get(each.data_ptr(), 0))
        elif isinstance(each, tuple | list):
            todo += each
        elif hasattr(each, "__dataclass_fields__"):
            todo += [getattr(each, name) for name in each.__dataclass_fields__ if "rotations" not in name]
    return sum(seen.values())


@pytest.mark.parametrize("number_format", ["dense", "fp8", "w4a8"])
def test_the_estimate_of_weights_is_near_what_they_take(number_format):
    values = SMALL | {
        "hidden_size": 512,
        "moe_intermediate_size": 384,
        "vocab_size": 4000,
        "num_attention_heads": 16,
        "v_head_dim": 128,
    }
    taken = stored_bytes(prepare(random_model(values, number_format, 16, torch.device("cpu"))))
    name = "bf16" if number_format == "dense" else number_format
    assert gpu.weight_bytes(config_of(values), name) == pytest.approx(taken, rel=0.01)


def test_the_estimate_of_sparse_weights_is_near_what_they_take():
    values = SMALL | {"hidden_size": 512, "moe_intermediate_size": 512, "vocab_size": 4000}
    with torch.inference_mode():
        taken = stored_bytes(prepare(random_model(values, "s14", 16, torch.device("cpu"))))
    config = replace(config_of(values), storage=SparseStorage(128))
    assert gpu.weight_bytes(config, "w4a8") == pytest.approx(taken, rel=0.05)
    assert gpu.weight_bytes(config, "w4a16") > 1.5 * taken
    assert gpu.weight_bytes(config, "w4a8", spread=True) == gpu.weight_bytes(config, "w4a16")


def test_weights_that_do_not_fit_are_refused_with_what_would():
    config, device = config_of(LARGE), torch.device("cuda:1")
    gpu.check_weights_fit(config, "bf16", device, free=40 * 10**9)
    with pytest.raises(
        SettingsError, match=r"31.5 GB as bf16, and cuda:1 has 24.0 GB free; use --format w4a8, "
    ):
        gpu.check_weights_fit(config, "bf16", device, free=24 * 10**9)
    with pytest.raises(SettingsError, match=r"has 4.0 GB free; use a larger GPU"):
        gpu.check_weights_fit(config, "w4a8", device, free=4 * 10**9)
    gpu.check_weights_fit(config, "bf16", device, free=24 * 10**9, share=0.5)
    sentence = (
        r"the weights of this rank take about 15.7 GB .*; use --format w4a8, .* or use .* or more ranks"
    )
    with pytest.raises(SettingsError, match=sentence):
        gpu.check_weights_fit(config, "bf16", device, free=8 * 10**9, share=0.5)


@pytest.mark.parametrize(("number_format", "spread"), [("w4a16", False), ("w4a8", True)])
def test_sparse_weights_leave_room_for_the_dense_ones_that_they_become(monkeypatch, number_format, spread):
    """They are read before the KV cache is allocated, and become dense afterwards."""
    rows, device, options = CacheShape(27, 576, 16, torch.bfloat16), torch.device("cuda:1"), EngineOptions()
    total, dense, read = 24 * 10**9, gpu.weight_bytes(config_of(LARGE), number_format), 35 * 10**8

    def room(storage, taken):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (total - taken, total))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: taken)
        config = replace(config_of(LARGE), storage=storage)
        return gpu.cache_bytes(device, rows, options, gpu.growth(config, number_format, device, 1.0, spread))

    assert read < dense
    assert room(SparseStorage(128), read) == room(None, dense)
    assert room(SparseStorage(128), dense + 10**9) == room(None, dense + 10**9)


@pytest.mark.parametrize(
    ("sizes", "pages", "alone"),
    [
        ({"max_batch_size": 4, "context_length": 16 * 500}, 990, 1000),
        ({"max_batch_size": 4, "context_length": 16 * 500, "kv_memory": 900 * ROWS.page_bytes}, 900, 900),
        ({"max_batch_size": 1, "context_length": 16 * 500}, 500, 500),
        ({"max_batch_size": 4, "context_length": 16 * 995}, 995, 1000),
    ],
    ids=["all there is", "as set", "a full batch", "one context"],
)
def test_a_rank_that_replaces_another_may_find_a_little_less_room(monkeypatch, sizes, pages, alone):
    """Where the ranks of a mesh take all the room that there is."""
    monkeypatch.setattr(gpu, "cache_bytes", lambda *_: 1000 * ROWS.page_bytes)
    monkeypatch.setattr(PagedCache, "allocate", lambda _shape, pages, _device: pages)
    options, member = EngineOptions(**sizes), SimpleNamespace(leads=True, channels=[])
    context, device = sizes["context_length"], torch.device("cuda")
    assert loading._allocate_cache(ROWS, options, context, device, member, 0) == pages
    assert loading._allocate_cache(ROWS, options, context, device, None, 0) == alone


@pytest.mark.parametrize(
    ("module", "name", "make"),
    [
        (cuda_runner, "CudaRunner", gpu.make_runner),
        (cuda_stage, "CudaStage", lambda model, cache, *rest: gpu.make_stage(model, cache, None, *rest)),
    ],
)
def test_a_device_without_room_for_forward_passes_is_told_in_a_sentence(monkeypatch, module, name, make):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, name, no_room)
    model = random_model(SMALL, "dense", 16, torch.device("cpu"))
    with pytest.raises(DeviceMemoryError, match=r"cpu has no memory for forward passes .*; lower the KV mem"):
        make(model, None, EngineOptions(), 16, False)


def test_the_frames_of_the_offload_are_no_memory_for_the_cache():
    rows, gib = CacheShape(27, 576, 16, torch.bfloat16), 1 << 30
    page, one = rows.page_bytes, 1024 * rows.bytes_per_token
    frames = (256 << 20) // page * page + (128 << 20) // page * page + 2 * page

    def check(left, total=10 * gib, **changes):
        options = EngineOptions(max_batch_size=1, **changes)
        gpu.check_cache_fits(rows, options, 1024, torch.device("cuda:1"), left, total, passes=0)

    for offload, needed in ((0, one), (gib, one + frames)):
        check(needed + gib, kv_offload=offload)
        check(needed, kv_offload=offload, kv_memory=one)
        with pytest.raises(SettingsError, match=r"KV memory of \d+ bytes is too small: one context of 1024 "):
            check(needed + gib - page, kv_offload=offload)
        with pytest.raises(SettingsError, match=r"leave about 0.\d GB of cuda:1; lower the KV memory"):
            check(needed - page, kv_offload=offload, kv_memory=one)
    with pytest.raises(SettingsError, match=r"and the frames of the KV offload 0.4 GB, and "):
        check(one, kv_offload=gib, kv_memory=one)


def test_a_gpu_without_the_kv_memory_is_refused_though_a_full_batch_takes_less():
    rows, options = (
        CacheShape(27, 576, 16, torch.bfloat16),
        EngineOptions(max_batch_size=1, kv_memory=1 << 50),
    )
    with pytest.raises(
        SettingsError, match=r"takes 1125899.9 GB, and the weights leave about 40.0 GB of cuda:1"
    ):
        gpu.check_cache_fits(rows, options, 1024, torch.device("cuda:1"), 40e9, 80 * 10**9, passes=0)


def test_a_kv_memory_that_leaves_no_room_for_passes_is_refused_and_little_room_is_told(caplog):
    """Before the weights are read, which takes minutes. Without a KV memory a tenth of the GPU is left."""
    config, device = config_of(LARGE), torch.device("cuda:1")
    rows, total, memory = CacheShape(27, 576, 16, torch.bfloat16), 80 * 10**9, 40 * 10**9
    options = EngineOptions(max_batch_size=256, kv_memory=memory)
    passes = gpu.pass_bytes(config, options)
    assert passes > 256 * config.vocab_size * 4

    def check(left, options=options):
        gpu.check_cache_fits(rows, options, 16_384, device, left, total, passes)

    with pytest.raises(
        SettingsError, match=r"leaves about 0.0 GB of cuda:1 for forward passes, which take more"
    ):
        check(memory)
    assert not caplog.records
    check(memory + passes)
    assert "GB of cuda:1 for forward passes and their CUDA graphs; leave the KV memory out" in caplog.text
    caplog.clear()
    check(memory + total // 10 + rows.page_bytes)
    check(memory, EngineOptions(max_batch_size=256))
    assert not caplog.records


@given(st.integers(1, 1000))
def test_every_batch_has_a_recorded_step_that_is_not_twice_its_size(largest):
    sizes = batch_sizes(largest)
    assert sizes[-1] == largest
    for count in range(1, largest + 1):
        size = next(size for size in sizes if size >= count)
        assert size < 2 * count
        assert size <= count + 31 or largest <= 64
