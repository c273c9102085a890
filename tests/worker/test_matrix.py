"""Every class of matrices is moved, cut, padded, joined and multiplied as the dense matrix it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_worker.config import engine
from moe_worker.models.memory import weight_memory
from moe_worker.quant.formats import FORMATS
from moe_worker.quant.fp8 import quantize_fp8
from moe_worker.quant.int4 import Int4Weight, quantize_int4
from moe_worker.quant.int8 import round_pieces
from moe_worker.quant.matrix import Dense, join_rows, stack
from tests.compress.sparse import random, random_sparse


def asymmetric(outputs, inputs, seed):
    weight = quantize_int4(random(outputs, inputs, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.randint(-8, 8, weight.scales_OG.shape, generator=generator, dtype=torch.int8)
    return Int4Weight(weight.packed_OP, weight.scales_OG, zeros, inputs)


KINDS = {
    "dense": lambda outputs, inputs, seed: Dense(random(outputs, inputs, seed=seed)),
    "fp8": lambda outputs, inputs, seed: quantize_fp8(random(outputs, inputs, seed=seed)),
    "int4": lambda outputs, inputs, seed: quantize_int4(random(outputs, inputs, seed=seed)),
    "asymmetric": asymmetric,
    "s14": lambda outputs, inputs, seed: random_sparse(outputs, inputs, group=128, seed=seed),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
QUICK = settings(max_examples=25, deadline=None)
sizes = given(outputs=st.integers(1, 20), pieces=st.integers(1, 3), seed=st.integers(0, 99))


def whole(matrix):
    return matrix.dequantize(torch.float32)


@every_kind
@QUICK
@sizes
def test_it_is_moved_cut_and_padded_as_a_dense_one(make, outputs, pieces, seed):
    matrix = make(outputs, 128 * pieces, seed)
    dense = whole(matrix)
    assert (matrix.outputs, matrix.inputs) == dense.shape
    assert torch.equal(whole(matrix.map(lambda rows: rows.flip(0))), dense.flip(0))
    parts = matrix.split_inputs(pieces)
    assert torch.equal(torch.cat([whole(part) for part in parts], dim=1), dense)
    padded = matrix.pad_inputs(192)
    assert torch.equal(whole(padded), torch.nn.functional.pad(dense, (0, 192)))
    assert torch.equal(whole(padded.split_inputs(1)[0]), whole(padded))
    assert sum(weight_memory(matrix).values()) == matrix.nbytes


@every_kind
@QUICK
@sizes
def test_several_are_joined_and_stacked_as_dense_ones(make, outputs, pieces, seed):
    matrices = [make(outputs, 128 * pieces, seed + more) for more in range(3)]
    assert torch.equal(whole(join_rows(matrices)), torch.cat([whole(each) for each in matrices]))
    stacked = stack(matrices)
    assert stacked.count == 3
    assert type(stacked) is type(matrices[0])
    assert torch.equal(whole(stacked[1]), whole(matrices[1]))


@pytest.mark.parametrize("first", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("second", KINDS.values(), ids=KINDS)
def test_formats_may_be_mixed(first, second):
    matrices = [first(5, 256, 1), second(7, 256, 2)]
    assert torch.equal(whole(join_rows(matrices)), torch.cat([whole(each) for each in matrices]))


@every_kind
@QUICK
@sizes
def test_it_multiplies_as_the_dense_one(make, outputs, pieces, seed):
    matrix, x, bias = make(outputs, 128 * pieces, seed), random(4, 128 * pieces), random(outputs, seed=1)
    dense = whole(matrix)
    assert torch.allclose(matrix.multiply(x, bias), x @ dense.T + bias, atol=1e-4)
    read = round_pieces(x, 64) if matrix.takes_int8 else x
    assert torch.allclose(matrix.multiply(x, bias, 64), read @ dense.T + bias, atol=1e-4)


@every_kind
def test_groups_cannot_be_cut(make):
    matrix = make(3, 256, 0)
    if matrix.unit > 1:
        with pytest.raises(ValueError, match="4 parts of 64 inputs cut groups of 128"):
            matrix.split_inputs(4)


def test_formats_have_the_names_that_users_give():
    assert ("auto", *FORMATS) == engine.FORMATS
    for name, each in FORMATS.items():
        assert each.name == name
        assert type(each.quantize(random(4, 128), 128)) in each.matrices
