"""Numbers of a training run have one range each, which options, recipes and the library share."""

from dataclasses import fields
from pathlib import Path

import pytest

from moe_worker.errors import SettingsError
from moe_worker.recipe.parse import _RANGES, Finetune, Prune, Quantize, Sparsify, Training
from moe_worker.train.cli import train
from moe_worker.train.settings import RANGES, TrainSettings

NUMBERS = {"int", "float", "int | None", "float | None"}
WRONG = {
    "learning_rate": [-1e-3, 0.0, float("nan"), float("inf")],
    "batch": [0, 1 << 60],
    "steps": [-1],
    "dropout": [0.91],
    "seed": [-1, 1 << 63],
    "stop_after": [-1.0],
    "teacher_top": [0, 257],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_the_library_refuses_what_the_command_refuses(name, value):
    with pytest.raises(SettingsError, match=f"{name} is .*; it must be"):
        TrainSettings(Path("data"), Path("out"), Path("config"), **{name: value})


def test_every_number_has_a_range_and_an_option_with_it():
    assert RANGES.keys() == {entry.name for entry in fields(TrainSettings) if entry.type in NUMBERS}
    options = {option.name: option.type for option in train.params}
    for name, numbers in RANGES.items():
        assert options[name].min == numbers.least
        assert options[name].max in (numbers.most, None)


def test_every_number_of_a_recipe_has_a_range():
    for kind in (Training, Finetune, Sparsify, Quantize, Prune):
        for entry in fields(kind):
            assert entry.type not in NUMBERS or entry.name in _RANGES
