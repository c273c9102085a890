"""The Triton kernel for 1:4 sparse weights, on a GPU or, with TRITON_INTERPRET=1, in Triton's interpreter."""

import os

import pytest
import torch

from moe_worker.kernels.triton.sparse14 import linear_sparse14
from moe_worker.quant.int8 import piece_of
from tests.compress.sparse import random, random_sparse

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET"
    ),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "group"),
    [(1, 128, 64, 128), (3, 320, 100, 128), (17, 256, 33, 256), (40, 64, 70, 128), (2, 100, 16, 128)],
)
def test_products_are_those_of_plain_torch(tokens, inputs, outputs, group):
    weight = random_sparse(outputs, inputs, group=group).map(lambda tensor: tensor.to(DEVICE))
    x = random(tokens, inputs, seed=1).to(DEVICE)
    truth = weight.multiply(x, piece=piece_of(inputs))
    assert (linear_sparse14(x, weight) - truth).abs().max() <= 2e-5 * truth.abs().max()


def test_groups_that_cut_pieces_are_refused():
    with pytest.raises(ValueError, match="groups of 64 cut pieces of 128"):
        linear_sparse14(torch.ones(1, 256, device=DEVICE), random_sparse(4, 256, group=64))
