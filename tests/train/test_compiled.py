"""On GPUs parts of the model are compiled: the same steps, and few versions of each part."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from moe_worker.config import read_model_config
from moe_worker.train.data import WindowSampler
from moe_worker.train.learner import Learner
from moe_worker.train.settings import TrainSettings


@pytest.fixture
def settings(tmp_path, write_config):
    """Ten steps that begin dense, tighten masks, and end with them fixed and in four bits."""
    return TrainSettings(
        data=tmp_path,
        out=tmp_path,
        config=write_config(num_hidden_layers=3, hidden_size=64, moe_intermediate_size=64, v_head_dim=16),
        steps=10,
        batch=2,
        window=16,
        dropout=0.0,
        sequence_balance=0.1,
        sparsity="s14",
        w4a8_share=0.2,
        group=32,
    )


def learner(settings):
    torch.manual_seed(0)
    return Learner(read_model_config(settings.config), settings, torch.device("cpu"))


def test_compiled_parts_learn_the_same_in_few_versions(settings):
    plain, compiled = learner(settings), learner(settings)
    compiled.model.compile_parts(backend="eager")
    counters.clear()
    tokens_N = torch.randint(2, 320, (2000,), generator=torch.Generator().manual_seed(1))
    sampler = WindowSampler(tokens_N, settings.window, settings.batch, seed=0)
    for step in range(settings.steps):
        plain.step(step, sampler, None, measure=False)
        compiled.step(step, sampler, None, measure=False)
        assert float(compiled.last_loss) == pytest.approx(float(plain.last_loss), abs=1e-3)
    # Two kinds of layers and the loss, each for weights that are the model's own, masked, and rounded.
    assert counters["stats"]["unique_graphs"] <= 9
    assert not counters["graph_break"]


def test_windows_scored_together_score_as_each_alone(settings):
    learned = learner(replace(settings, steps=0, dense_share=0.0, shrink_share=0.0, w4a8_share=1.0))
    learned.prepare()
    tokens_N = torch.randint(2, 320, (60,), generator=torch.Generator().manual_seed(2)).int().numpy()
    windows = [tokens_N[:17], tokens_N[20:24], tokens_N[30:32]]
    alone = sum(learned.nats([window]) for window in windows)
    assert learned.nats(windows) == pytest.approx(alone, rel=1e-3)
