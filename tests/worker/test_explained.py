"""What `--explain` prints is what runs: a forward pass is watched for the functions that it names."""

import logging
import sys
from dataclasses import replace

import pytest
import torch

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.loading import explain_choice, load
from moe_worker.kernels import registry
from moe_worker.kernels.cpu import build, library
from moe_worker.kvcache.paged import PagedCache
from moe_worker.models.batch import Batch, Segment
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.sampling.sampler import Sampler
from tests.checkpoints import write_checkpoint

try:
    NATIVE = library.supported_variants()
except build.BuildError:
    NATIVE = []


def called(function):
    """MODULE.NAME of every Python function of the worker that `function` calls."""
    found = set()

    def watch(frame, event, _argument):
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("moe_worker."):
            found.add(f"{module.removeprefix('moe_worker.')}.{frame.f_code.co_qualname}")

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize(
    ("family", "number_format"),
    [
        ("deepseek_v3", "dense"), ("deepseek_v3", "w4a16"), ("deepseek_v3", "fp8"),
        pytest.param("deepseek_v3", "w4a8", marks=pytest.mark.skipif(not NATIVE, reason="no C++ compiler")),
        ("qwen3_moe", "w4a8"),
    ],
)  # fmt: skip
def test_every_named_function_runs(tmp_path, caplog, family, number_format):
    checkpoint = write_checkpoint(tmp_path, family=family)
    options = EngineOptions(device="cpu", format=number_format, context_length=64, threads=1)
    with caplog.at_level(logging.INFO):
        loaded = load(checkpoint, options, progress=False)
    cache = PagedCache.allocate(loaded.cache.shape, 4, loaded.device)

    sampler = Sampler(loaded.config.vocab_size, loaded.device, ())
    sampler.admit(0, SamplingParameters(temperature=1.0), 0, ())

    @torch.inference_mode()
    def step():
        logits = loaded.runner.logits(Batch.of([Segment([5, 6, 7], 0, [0])], cache), cache, [2])
        sampler.sample(logits, [0])

    found = called(step)
    lines = explain_choice(checkpoint, options)[1:]
    [logged] = [line for line in lines if f"kernels: {line}" in caplog.messages]
    assert " pass: " in logged
    assert len(lines) == len(registry.OPERATIONS)
    for line in lines:
        assert line.split(": ")[1].split(" (")[0].split(", ")[1] in found, line


def test_experts_over_several_ranks_are_said(tmp_path):
    lines = explain_choice(write_checkpoint(tmp_path), EngineOptions(device="cpu", mesh="1x2"))
    assert "fp32 dispatch: reference, mesh.dispatch.AllToAllDispatch.scatter" in "\n".join(lines)


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
def test_operations_of_a_stage_that_is_not_fused_are_said(tmp_path):
    """All but the dispatch run in one process, too, one call an operation."""
    checkpoint = write_checkpoint(tmp_path)
    options = EngineOptions(device="cpu", format="w4a8", context_length=64, threads=1)
    loaded = load(checkpoint, options, progress=False)
    model = replace(loaded.runner.model, fused=False)
    cache = PagedCache.allocate(loaded.cache.shape, 4, loaded.device)

    @torch.inference_mode()
    def step():
        model.next_logits(Batch.of([Segment([5, 6, 7], 0, [0])], cache), cache, [2])

    found = called(step) | {"mesh.dispatch.AllToAllDispatch.scatter", "kernels.draw.draw_plain"}
    for line in explain_choice(checkpoint, replace(options, mesh="1x2"))[1:]:
        assert line.split(": ")[1].split(" (")[0].split(", ")[1] in found, line
