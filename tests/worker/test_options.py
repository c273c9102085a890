"""What the user chooses about the engine: impossible values are refused, all others reach its process."""

import pytest

from moe_worker import framing
from moe_worker.config.engine import BOUNDS, EngineOptions
from moe_worker.errors import SettingsError
from moe_worker.service import wire

ENDS = [(name, value) for name, bounds in BOUNDS.items() for value in bounds]


def nested(depth):
    return {} if depth == 0 else {"a": nested(depth - 1)}


@pytest.mark.parametrize(("name", "value"), ENDS)
def test_the_least_and_the_most_of_each_number_reach_the_engine(name, value):
    mesh = {"mesh": "1x1024"} if "mesh" in name or "redundant" in name else {}
    start = wire.Start("model", EngineOptions(**{name: value}, **mesh))
    assert wire.decode(wire.encode(start)[framing.LENGTH_BYTES :]) == start


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, bound + step)
        for name, bounds in BOUNDS.items()
        for bound, step in zip(bounds, (-1, 1), strict=True)
    ]
    + [("target_step_ms", float("nan")), ("target_step_ms", float("inf"))]
    + [(name, 2**70) for name in BOUNDS],
)
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(SettingsError, match=f"{name} is .*; it must be "):
        EngineOptions(**{name: value})


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ({"a": [10**30]}, "holds a whole number of 100 bits; use at most 63"),
        ({"a": {"b": "\ud800"}}, r"holds '\\ud800', which is not text"),
        ({"\udcff": 1}, r"holds '\\udcff', which is not text"),
        (nested(500), "nests more than 16 deep"),
    ],
)
def test_overrides_that_no_config_can_hold_are_refused(override, sentence):
    with pytest.raises(SettingsError, match=f"config_override {sentence}"):
        EngineOptions(config_override=override)


def test_any_other_override_reaches_the_engine():
    values = {"a": {"b": [-(2**63) + 1, 2**63 - 1, 1e308, True, None, "\U0001f642"]}}
    start = wire.Start("model", EngineOptions(config_override=values))
    assert wire.decode(wire.encode(start)[framing.LENGTH_BYTES :]) == start
