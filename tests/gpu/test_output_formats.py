"""Masks of output formats on a GPU; tests/worker/test_output_formats.py has them on a CPU."""

import pytest

import moe_worker
from tests.checkpoints import write_checkpoint
from tests.gpu.device import DEVICE, needs_cuda
from tests.worker.mask_cases import ROWS, check_masked_scores, check_shared_lexer

pytestmark = needs_cuda


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return moe_worker.Engine(write_checkpoint(tmp_path_factory.mktemp("checkpoint")), threads=1)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_shared_lexer_gives_the_masks_of_one_of_its_own(engine, threads):
    check_shared_lexer(engine, threads, DEVICE)


@pytest.mark.parametrize("rows", ROWS)
def test_masks_leave_the_scores_of_allowed_tokens_alone(rows):
    check_masked_scores(rows, DEVICE)
