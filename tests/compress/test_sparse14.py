"""The layout s14: exact round trips, byte by byte as documented, and hostile checkpoints."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import moe_worker
from moe_worker.config.directory import read_checkpoint_config
from moe_worker.errors import CheckpointError
from moe_worker.kernels.cpu.library import Kernels
from moe_worker.models.batch import Segment
from moe_worker.models.checkpoint import Placement, load_model
from moe_worker.models.native import NativeModel
from moe_worker.quant import matrix, sparse14
from moe_worker.quant.int4 import Int4Weight, pack, quantize_int4
from tests.checkpoints import write_checkpoint
from tests.compress.sparse import make_sparse, random, random_sparse
from tests.worker.test_native import new_cache, ours, truth

QUICK = settings(max_examples=80, deadline=None)
fours = st.integers(1, 40).map(lambda quads: 4 * quads)


@QUICK
@given(
    inputs=fours, outputs=st.integers(1, 9), group=st.sampled_from([4, 32, 64, 128]), seed=st.integers(0, 99)
)
def test_packing_and_back_is_exact(inputs, outputs, group, seed):
    weight = random_sparse(outputs, inputs, group=group, seed=seed)
    again = sparse14.from_tensors(sparse14.to_tensors(weight), inputs, group)
    dense = again.dequantize(torch.float32)
    assert int((dense != 0).unflatten(-1, (-1, 4)).sum(-1).max()) <= 1
    places = 4 * torch.arange(inputs // 4) + again.positions()
    assert torch.equal(dense.gather(1, places.long()), again.scaled())
    assert {name: tuple(t.shape) for name, t in sparse14.to_tensors(weight).items()} == sparse14.shapes(
        outputs, inputs, group
    )


@QUICK
@given(inputs=fours, seed=st.integers(0, 99))
def test_a_dense_matrix_of_the_same_numbers_comes_back_to_the_bit(inputs, seed):
    weight = random_sparse(5, inputs, seed=seed)
    dense = weight.dequantize(torch.float32)
    scales = weight.scales_OG.repeat_interleave(weight.group, -1)[:, :inputs]
    repacked = sparse14.from_int4(
        Int4Weight(
            pack((dense / scales).round().to(torch.int8)), weight.scales_OG, None, inputs, weight.group
        )
    )
    assert torch.equal(repacked.dequantize(torch.float32), dense)


def test_bytes_are_those_of_the_documentation():
    """The example of docs/formats.md, bit by bit."""
    row = torch.zeros(1, 24, dtype=torch.int8)
    for place, value in ((2, 5), (4, -1), (11, 7), (13, -7), (16, 1), (23, 2)):
        row[0, place] = value
    weight = sparse14.from_int4(Int4Weight(pack(row), torch.ones(1, 1), None, 24, 128))
    assert weight.values_OP.tolist() == [[0x7D, 0x1F, 0xA9]]
    assert weight.positions_OR.tolist() == [[0b01_11_00_10, 0b00_00_11_00]]


def test_rows_halves_and_stacks_are_cut_as_dense_ones_are():
    parts = [random_sparse(4, 128, seed=seed) for seed in range(3)]
    dense = [part.dequantize(torch.float32) for part in parts]
    joined = matrix.join_rows(parts)
    assert torch.equal(joined.dequantize(torch.float32), torch.cat(dense))
    assert torch.equal(matrix.stack(parts).dequantize(torch.float32), torch.stack(dense))
    halves = joined.split_inputs(2)
    assert torch.equal(torch.cat([h.dequantize(torch.float32) for h in halves], 1), torch.cat(dense))
    turned = joined.map(lambda rows: rows.flip(0))
    assert torch.equal(turned.dequantize(torch.float32), torch.cat(dense).flip(0))
    mixed = matrix.join_rows([parts[0], quantize_int4(random(4, 128))])
    assert torch.equal(mixed.dequantize()[:4], dense[0])
    same_groups = matrix.join_rows([parts[0], quantize_int4(random(4, 128), 64)])
    assert isinstance(same_groups, Int4Weight)
    assert torch.equal(same_groups.dequantize(torch.float32)[:4], dense[0])


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (quantize_int4(torch.ones(2, 8)), "a quad has more than one weight"),
        (quantize_int4(torch.zeros(2, 6)), "inputs and groups of multiples of 4"),
        (replace(quantize_int4(torch.zeros(2, 8)), zeros_OG=torch.ones(2, 1)), "symmetric weights"),
    ],
)
def test_what_is_not_sparse_so_is_refused(weight, why):
    with pytest.raises(ValueError, match=why):
        sparse14.from_int4(weight)


@pytest.fixture(scope="module")
def sparse_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64, "q_lora_rank": 64}
    dense = write_checkpoint(folder / "dense", v_head_dim=32, **sizes)
    return make_sparse(dense, folder / "sparse")


def damaged(checkpoint, folder, change):
    tensors = load_file(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    change(tensors, config)
    for name in ("tokenizer.json",):
        (folder / name).write_text((checkpoint / name).read_text())
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


O_PROJ = "model.layers.0.self_attn.o_proj.weight_"
NO_BYTES, NO_SCALES = torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(128, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t, c: t.pop(O_PROJ + "s14_positions"), "o_proj.weight_s14_positions is missing"),
        (lambda t, c: t.update({O_PROJ + "s14_values": NO_BYTES}), "has shape"),
        (lambda t, c: t.update({O_PROJ + "scale": NO_SCALES}), "stored as I32"),
        (lambda t, c: c["quantization_config"].update(version=2), "written by a newer release"),
        (lambda t, c: c["quantization_config"].update(group_size=6), "is 6; it must be a multiple of 4"),
        (lambda t, c: c["quantization_config"].update(format="s12"), "format is 's12'"),
    ],
)
def test_damaged_checkpoints_end_in_a_sentence(sparse_checkpoint, tmp_path, change, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        moe_worker.Engine(damaged(sparse_checkpoint, tmp_path, change))


def test_every_format_computes_the_same_model(sparse_checkpoint):
    ids = list(range(2, 60))
    truth = moe_worker.Engine(sparse_checkpoint, format="dense").logits(ids)
    exact = moe_worker.Engine(sparse_checkpoint, format="w4a16").logits(ids)
    assert (exact - truth).abs().max() < 1e-4 * truth.abs().max()
    assert moe_worker.Engine(sparse_checkpoint).generate(["the quick"])[0].token_ids


def test_a_pass_on_the_cpu_kernels_is_that_of_the_reference(sparse_checkpoint):
    placement = Placement(torch.float32, torch.device("cpu"), "w4a8")
    config = read_checkpoint_config(sparse_checkpoint)
    with torch.inference_mode():
        model = load_model(sparse_checkpoint, config, placement, 256, progress=False)
    native = NativeModel.of(model, Kernels(threads=1))
    segments = [Segment(list(range(2, 30)), 0, range(2)), Segment([5, 9, 7], 0, range(4, 5))]
    results = []
    for compute, weights in ((ours, native), (truth, model)):
        results.append(compute(weights, segments, new_cache(model)))
    assert (results[0] - results[1]).norm() < 0.02 * results[1].norm()


def test_memory_is_told_by_kind(sparse_checkpoint, capsys):
    moe_worker.Engine(sparse_checkpoint, progress=True)
    kinds = r"weights in memory: (\S+) MB values, (\S+) MB positions, (\S+) MB scales, "
    told = re.search(kinds, capsys.readouterr().err)
    stored = load_file(sparse_checkpoint / "model.safetensors")
    head = quantize_int4(stored["model.embed_tokens.weight"], 64)  # plain in the file, rounded at load
    more = {"s14_values": head.packed_OP.nbytes, "weight_scale": head.scales_OG.nbytes}
    for number, part in enumerate(("s14_values", "s14_positions", "weight_scale"), 1):
        nbytes = sum(tensor.nbytes for name, tensor in stored.items() if name.endswith(part))
        assert float(told[number]) == pytest.approx((nbytes + more.get(part, 0)) / 1e6, abs=0.006)
