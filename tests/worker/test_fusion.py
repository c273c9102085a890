"""`moe-worker explain --fusion`: what a decode step launches, against transformers."""

import re

import pytest

from moe_worker.bench.fusion import LaunchCount, measure_fusion
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


@pytest.mark.filterwarnings("error::FutureWarning")
def test_plain_torch_is_not_fused(checkpoint):
    found = fusion(checkpoint, "dense")
    assert found.ours > found.unfused / 4


def test_without_a_model_of_transformers_the_own_count_stands_alone(checkpoint, monkeypatch):
    def refuses(*_, **options):
        assert not options["trust_remote_code"]
        raise ValueError("model type `x`\nis not known")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuses)
    found = fusion(checkpoint, "dense")
    assert str(found) == (
        f"a decode step of one token takes {found.ours} operators; the eager model was not counted: this "
        "transformers cannot make it (model type `x` is not known)"
    )


def test_more_launches_than_the_eager_model_are_called_more():
    assert str(LaunchCount("operators", 5, 4)).endswith(
        "5 operators, 4 in the eager model of transformers: 25.0% more"
    )
    assert "takes 1 operator, " in str(LaunchCount("operators", 1, 4))
