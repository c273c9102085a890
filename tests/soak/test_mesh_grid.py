"""Every mesh of one to three stages of one, two or four ranks gives what one process gives."""

import pytest

from moe_worker.mesh import pulse
from tests.worker.mesh_ranks import PATIENT_S
from tests.worker.test_mesh import compare_with_one_process

FAMILIES = ("deepseek_v2", "deepseek_v3", "qwen3_moe")
SHAPES = [(pipeline, expert) for pipeline in (1, 2, 3) for expert in (1, 2, 4) if pipeline * expert > 1]
CASES = [
    (family, f"{pipeline}x{expert}", redundant)
    for family in FAMILIES
    for pipeline, expert in SHAPES
    for redundant in ({0, expert} if expert > 1 else {0})
]


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("family", "shape", "redundant"), CASES)
def test_a_mesh_computes_what_one_process_computes(tmp_path, monkeypatch, family, shape, redundant):
    """With chunked prompts, shared prefixes, and preempted requests."""
    monkeypatch.setattr(pulse, "SILENT_S", PATIENT_S)
    options = {"redundant_experts": redundant, "prefill_tokens": 30}
    compare_with_one_process(tmp_path, family, shape, options)
