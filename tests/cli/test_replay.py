"""`moe replay` as scripts and people see it."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from moe_cli.main import main


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    chance, steps = np.random.default_rng(1), np.arange(2 * 144)
    rates = np.maximum(0, 5 + 3 * np.sin(2 * np.pi * steps / 144) + chance.normal(0, 0.3, len(steps)))
    path = tmp_path_factory.mktemp("traces") / "waves.csv"
    path.write_text("t,rate\n" + "".join(f"{600 * step},{rate:.4f}\n" for step, rate in enumerate(rates)))
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["replay", *map(str, arguments)])


def assert_nothing_is_hidden(figure):
    """Every point of the capacity lines is inside the axes, and no legend covers them."""
    figure.draw_without_rendering()
    for axes in figure.axes[:2]:
        lines = [line for line in axes.get_lines() if str(line.get_label()).startswith("capacity")]
        assert len(lines) == 2
        assert all(max(line.get_ydata()) <= axes.get_ylim()[1] for line in lines)
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())


def test_the_document_has_the_stable_keys_and_the_same_bytes_again(trace, tmp_path):
    first = run(trace, "--horizon", 600, "--json", "--plot", tmp_path / "a.png")
    assert first.exit_code == 0, first.output
    made = json.loads(first.stdout)
    assert (made["trace"], made["interval_s"], made["horizon_s"]) == ("waves.csv", 600, 600)
    assert made["forecast"].keys() >= {
        *("method", "wape", "pinball_p90", "coverage_p90", "last_value_wape", "last_value_pinball_p90")
    }
    assert made["policies"].keys() == {
        *("moe", "static_peak", "hpa", "keda", "knative", "perfect", "clairvoyant")
    }
    for policy in made["policies"].values():
        assert policy.keys() >= {
            *("violated_share", "utilisation", "gpu_hours", "gpu_hours_over_clairvoyant", "scale_events")
        }
    assert made["policies"]["clairvoyant"]["gpu_hours_over_clairvoyant"] == 1
    second = run(trace, "--horizon", 600, "--json", "--plot", tmp_path / "b.png")
    assert second.stdout == first.stdout
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "forecasting: 100 % (288 of 288) after " in first.stderr
    assert "policies: 100 % (" in first.stderr
    assert first.stderr.endswith(f"wrote {tmp_path / 'a.png'}\n")


def test_people_get_tables(trace):
    result = run(trace, "--horizon", 600, "--tune-until", "1970-01-02")
    assert result.exit_code == 0, result.output
    assert "clairvoyant" in result.stdout
    assert "first 144 steps" in result.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--horizon", "0"], "0.0 is not in the range 0<x<=86400."),
        (["--horizon", "1e9"], "1000000000.0 is not in the range 0<x<=86400."),
        (["--fraction", "1e-9"], "replicas, more than 100,000; raise --capacity or --fraction"),
        (["--capacity", "1e-300"], "replicas, more than 100,000; raise --capacity or --fraction"),
        (["--capacity", "1e-300", "--fraction", "1e-300"], "needs inf replicas, more than 100,000; raise"),
        (["--plot", "a.txt"], "--plot a.txt: the name must end in .png"),
        (
            ["--plot", "nowhere/a.png"],
            "--plot nowhere/a.png: directory nowhere does not exist; create it first",
        ),
        (["--fraction", "nan"], "nan is not a finite number; give one in the range x>0."),
        (["--tune-until", "soon"], "neither a share like 0.5 nor a time"),
        (["--tune-until", "1"], "leaves nothing before or after it"),
        (["--tune-until", "2030-01-01"], "leaves nothing before or after it"),
        (["--work", "tokens"], "it records no tokens"),
    ],
)
def test_wrong_options_say_what_would_be_right(trace, arguments, sentence):
    result = run(trace, *arguments)
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())


@pytest.mark.parametrize(
    "rates",
    [[5, 7, 6], [0, 0, 0, 0, 0, 9, 1, 2], [3] * 7, [0, 400, 0, 0, 250, 0, 0, 0, 300] * 4],
    ids=["three minutes", "silence first", "constant", "bursts"],
)
def test_short_traces_have_numbers_where_there_can_be_some(tmp_path, rates, monkeypatch):
    path = tmp_path / "short.csv"
    path.write_text("time,requests\n" + "".join(f"{60 * n},{rate}\n" for n, rate in enumerate(rates)))
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    result = run(path, "--json", "--plot", tmp_path / "short.png")
    assert result.exit_code == 0, result.output
    assert_nothing_is_hidden(*drawn)
    made = json.loads(result.stdout)
    scored = len(rates) > 5
    assert (made["forecast"]["wape"] is not None) == scored, "nothing is five minutes after the beginning"
    for policy in made["policies"].values():
        assert policy["gpu_hours"] > 0
        assert 0 <= policy["violated_share"] <= 100
    assert run(path).exit_code == 0


@pytest.mark.parametrize(
    ("rates", "sentence"),
    [
        ([5, 6], "short.csv has 2 steps of 1 min; a replay needs 3 or more"),
        ([0, 0, 0, 0], "no work arrives"),
        ([1e-300] * 7, "no work arrives"),
    ],
)
def test_a_trace_that_nothing_can_be_said_of_is_refused(tmp_path, rates, sentence):
    path = tmp_path / "short.csv"
    path.write_text("time,requests\n" + "".join(f"{60 * n},{rate}\n" for n, rate in enumerate(rates)))
    result = run(path)
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    result = run(path)
    assert result.exit_code == 2
    assert "a trace is a CSV file" in result.output
