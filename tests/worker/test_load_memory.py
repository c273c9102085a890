"""Host memory while a model loads is hardly more than its weights take afterwards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.gpu_checkpoint import Recorder, write_tokenizer
from benchmarks.gpu_random import SMALL, config_of
from moe_worker.models.build import build_model

# 300 million parameters in as many layers as published models have. What is in use for a moment (a layer
# twice, and up to 10 MB for rounding a piece) must be small compared with the rest.
SIZED = SMALL | {
    "hidden_size": 512, "intermediate_size": 2048, "moe_intermediate_size": 384, "num_hidden_layers": 40,
    "n_routed_experts": 10, "num_experts_per_tok": 2, "vocab_size": 4000,
}  # fmt: skip


def write(directory, values):
    source = Recorder(torch.device("cpu"), torch.bfloat16, "dense")
    source.tensors = {}
    build_model(config_of(values), source, 1)
    directory.mkdir()
    save_file(source.tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(values))
    write_tokenizer(directory / "tokenizer.json")
    return directory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("sized")
    with torch.inference_mode():
        return write(root / "small", SMALL), write(root / "sized", SIZED)


@pytest.mark.slow
@pytest.mark.timeout(900)  # 170 s were too few on two cores that ran 15 processes
@pytest.mark.parametrize("number_format", ["dense", "fp8", "w4a8"])
def test_loading_takes_little_more_than_the_weights(checkpoints, number_format):
    command = [sys.executable, "-m", "tests.worker.load_memory", *map(str, checkpoints), number_format]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=890, check=True)
    found = json.loads(result.stdout)
    assert found["kept"] > 50e6
    assert found["peak"] <= 1.2 * found["kept"], found
