"""`moe-worker bench`, the user's own measurement."""

import json

import pytest

from tests.worker.test_command import failure, run


def test_it_measures_every_batch_and_draws(endless, tmp_path):
    picture = tmp_path / "bench.png"
    flags = ("--batch", 3, "--batch", 1, "--prompt", 20, "--tokens", 5, "--rounds", 1, "--threads", 1)
    done = run("bench", "--model", endless, *flags, "--json", "--plot", picture)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["batch"] for result in results] == [1, 3]
    for result in results:
        # Two ways to say the same: tokens a second of all streams, and the time between two of one.
        assert result["decode_tokens_per_s"] == pytest.approx(1e3 * result["batch"] / result["tpot_ms"])
        assert 0 < result["tpot_ms"] < 1e4
        assert result["prefill_tokens_per_s"] * result["ttft_ms"] / 1e3 <= 20 * result["batch"] * 1.001
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_line_for_each_batch(endless):
    done = run("bench", "--model", endless, "--batch", 2, "--prompt", 4, "--tokens", 3, "--rounds", 1)
    heading, line = done.stdout.splitlines()
    assert heading.split()[0] == "batch"
    assert line.split()[0] == "2"
    assert "measuring: 100 %" in done.stderr
    assert "\r" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prompt", "4090", "--tokens", "64"], "context length 4154 is too long"),
        (["--plot", "/nowhere/x.png"], "directory /nowhere does not exist"),
        (["--plot", "x.docx"], "must end in .png, .pdf or .svg"),
        (["--batch", "0"], "0 is not in the range x>=1"),
    ],
)
def test_what_cannot_be_measured_is_said_first(endless, flags, sentence):
    text, code = failure("bench", "--model", endless, *flags)
    assert sentence in text
    assert code == 2
