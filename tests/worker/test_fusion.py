"""`moe-worker explain --fusion`: what a decode step launches, against transformers."""

import re

import pytest

from moe_worker.bench.fusion import measure_fusion
from moe_worker.config.engine import EngineOptions
from tests.checkpoints import write_checkpoint
from tests.worker.test_explained import NATIVE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("fusion"))


def fusion(checkpoint, number_format):
    return measure_fusion(checkpoint, EngineOptions(device="cpu", format=number_format, threads=1))


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
def test_a_native_step_is_one_call_for_all_layers(checkpoint):
    found = fusion(checkpoint, "w4a8")
    assert found.unit == "operators"
    assert found.ours < 20
    assert found.unfused > 100
    assert re.search(
        rf"takes {found.ours} operators, {found.unfused} in the eager .*: 9.*% fewer", str(found)
    )


def test_plain_torch_is_not_fused(checkpoint):
    found = fusion(checkpoint, "dense")
    assert found.ours > found.unfused / 4
