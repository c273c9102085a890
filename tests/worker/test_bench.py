"""`moe-worker bench`, the user's own measurement."""

import json
import sys

import pytest

from moe_worker.engine.core import EngineCore
from moe_worker.main import main
from tests.worker.test_command import run


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs the command in this process, which has torch; its exit code and what it printed."""

    def run_here(*arguments):
        monkeypatch.setattr(sys, "argv", ["moe-worker", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run_here


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


def test_the_table_has_a_line_for_each_batch(endless, here):
    flags = ("--batch", 2, "--prompt", 4, "--tokens", 3, "--rounds", 1, "--threads", 1)
    _, printed, errors = here("bench", "--model", endless, *flags)
    heading, line = printed.splitlines()
    assert heading.split()[0] == "batch"
    assert line.split()[0] == "2"
    assert "measuring: 100 %" in errors
    assert "\r" not in errors


def test_it_samples_at_the_temperature_that_it_is_given(endless, here, monkeypatch):
    seen = set()

    def submit(self, request):
        seen.add(request.sampling.temperature)
        return plain(self, request)

    plain = EngineCore.submit
    monkeypatch.setattr(EngineCore, "submit", submit)
    flags = ("--batch", 2, "--prompt", 4, "--tokens", 3, "--rounds", 1, "--threads", 1)
    here("bench", "--model", endless, *flags, "--temperature", 0.7)
    assert seen == {0.7}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prompt", "4090", "--tokens", "64"], "context length 4154 is too long"),
        (["--plot", "/nowhere/x.png"], "directory /nowhere does not exist"),
        (["--plot", "x.docx"], "must end in .png, .pdf or .svg"),
        (["--batch", "0"], "0 is not in the range x>=1"),
        (["--temperature", "-1"], "-1.0 is not in the range 0<=x<=2.0"),
    ],
)
def test_what_cannot_be_measured_is_said_first(endless, here, flags, sentence):
    code, _, errors = here("bench", "--model", endless, *flags)
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence in last
    assert code == 2
