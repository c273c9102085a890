"""Pruning: what is cut does not matter where nothing used it, and a smaller checkpoint is a whole model."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_worker.compress.taylor import Importance
from moe_worker.config.model import parse_model_config
from moe_worker.errors import SettingsError
from moe_worker.train.data import WindowSampler
from moe_worker.train.model import TrainingModel
from moe_worker.train.prune import cut, measure, prune_checkpoint
from moe_worker.train.settings import TrainSettings
from moe_worker.train.sizes import ModelSizes
from moe_worker.train.trainer import train
from tests.train.conftest import CONFIG

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3}
SHAPE |= {"n_group": 2, "topk_group": 1}
SMALLER = ModelSizes(layers=2, heads=2, experts=4, channels=16, dense_channels=48)


@pytest.fixture
def sampler():
    tokens = torch.randint(2, 320, (4000,), generator=torch.Generator().manual_seed(0))
    return WindowSampler(tokens, window=32, batch=4, seed=0)


def silent_parts(model, heads, channels, experts):
    """Makes the given parts say nothing: their outputs are zero."""
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.o_proj.weight.unflatten(1, (4, -1))[:, heads] = 0
            if hasattr(layer.mlp, "down_EDF"):
                layer.mlp.down_EDF[:, :, channels] = 0
                layer.mlp.shared.down_proj.weight[:, channels] = 0
                layer.mlp.down_EDF[experts] = 0
                layer.mlp.bias_E[experts] = -10.0  # and nobody asks them
            else:
                layer.mlp.down_proj.weight[:, 48:] = 0


def test_parts_that_say_nothing_are_found_and_the_model_computes_the_same_without_them(sampler):
    config = {**CONFIG, **SHAPE, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = TrainingModel(parse_model_config(config, "config"), dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    silent_parts(model, heads=[0, 3], channels=list(range(0, 32, 2)), experts=[1, 2, 5, 6])
    batch = sampler.at(9)
    importance = measure(model, [sampler.at(step) for step in range(3)])
    state, smaller = cut(model, config, importance, replace(SMALLER, layers=2))
    pruned = TrainingModel(parse_model_config(smaller, "config"), dropout=0.0).eval()
    pruned.load_state_dict(state | {"lm_head.weight": state["embed_tokens.weight"]})
    with torch.no_grad():
        assert pruned(*batch) == pytest.approx(float(model.eval()(*batch)), abs=1e-5)


def test_a_pruned_checkpoint_is_one_that_transformers_and_the_trainer_take(
    tmp_path, write_config, text_file, sampler
):
    settings = TrainSettings(data=text_file, config=write_config(**SHAPE), out=tmp_path / "run", steps=10,
                             batch=4, window=32, warmup=2, device="cpu")  # fmt: skip
    train(settings)
    prune_checkpoint(settings.out, tmp_path / "lite", SMALLER, sampler, batches=2)
    config = json.loads((tmp_path / "lite" / "config.json").read_text())
    assert ModelSizes.of(config) == SMALLER
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lite", dtype=torch.float32)
    assert model.config.num_key_value_heads == 2
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    tuned = replace(settings, config=tmp_path / "lite" / "config.json", start_from=tmp_path / "lite",
                    out=tmp_path / "tuned", steps=3)  # fmt: skip
    train(tuned)
    assert len(load_file(tuned.out / "model.safetensors")) == len(
        load_file(tmp_path / "lite/model.safetensors")
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"heads": 5}, "heads is 5; the model has 4: give 1 to 4"),
        ({"layers": 0}, "layers is 0; the model has 3"),
        ({"experts": 5}, "experts is 5; it must be a multiple of n_group, 2"),
        ({"channels": 20}, "channels is 20; it must be a multiple of 8"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, sentence):
    config = {**CONFIG, **SHAPE}
    with pytest.raises(SettingsError, match=sentence):
        ModelSizes.of(config).check(replace(SMALLER, **changes), config)


def test_the_groups_of_levels_stay_whole():
    config = {**CONFIG, **SHAPE, "n_group": 1, "routing": {"levels": [{"groups": 4, "keep": 2}]}}
    with pytest.raises(SettingsError, match=r"a model with routing.levels cannot lose experts"):
        ModelSizes.of(config).check(SMALLER, config)


def test_experts_that_a_token_needs_stay():
    config = {**CONFIG, "num_experts_per_tok": 4}
    with pytest.raises(
        SettingsError,
        match="experts is 4; with 2 of 4 groups kept and 4 experts a token",
    ):
        ModelSizes.of(config).check(replace(ModelSizes.of(config), experts=4), config)


def test_progress_towards_smaller_sizes_is_steady_and_possible():
    config = {**CONFIG, **SHAPE, "n_routed_experts": 32}
    start = ModelSizes.of(config)
    way = [start.towards(SMALLER, share / 4, config) for share in range(1, 5)]
    assert way[-1] == SMALLER
    for before, after in zip([start, *way], way, strict=False):
        before.check(after, config)


def test_importance_is_the_mean_of_squares_and_equal_parts_stay_in_order():
    importance = Importance()
    importance.add({"a": torch.tensor([1.0, -3.0, 1.0])})
    importance.add({"a": torch.tensor([1.0, 1.0, -1.0])})
    assert importance["a"].tolist() == [1.0, 5.0, 1.0]
    assert importance.best("a", 2).tolist() == [0, 1]
