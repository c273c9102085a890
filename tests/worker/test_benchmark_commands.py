"""Benchmarks that cannot run say why in one sentence, before they compute anything."""

import contextlib
import importlib
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_checkpoint, gpu_session
from benchmarks.commands import run
from moe_worker.errors import SettingsError


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls the command of a benchmark; its exit code and the last line of what it printed."""

    def call(name, *arguments):
        if name.startswith(("gpu", "kv_offload", "serving")):
            pytest.importorskip("triton")
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"benchmarks.{name}").main()
        return ended.value.code, capsys.readouterr().err.splitlines()[-1]

    return call


@pytest.mark.parametrize(
    "name",
    [
        "gpu_decode",
        "gpu_fusion",
        "gpu_mesh",
        "gpu_prompt_steps",
        "gpu_session load",
        "gpu_tiles",
        "kv_offload",
        "serving_defaults",
    ],
)
def test_those_for_gpus_say_that_there_is_none(command, monkeypatch, name):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, line = command(*name.split())
    assert code == 2
    assert "needs a CUDA GPU" in line


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("gpu_decode", ["--batch", "0"], "argument --batch: '0' is no whole number of at least 1"),
        ("gpu_decode", ["--tokens", "1"], "argument --tokens: '1' is no whole number of at least 2"),
        ("gpu_decode", ["--temperature", "nan"], "'nan' is no finite number of at least 0"),
        ("gpu_decode", ["--top-p", "0"], "'0' is no number above 0 and at most 1"),
        ("gpu_decode", ["--top-k", "-1"], "'-1' is no whole number of at least 0"),
        ("gpu_mesh", ["--tokens", "1"], "'1' is no whole number of at least 2"),
        ("gpu_mesh", ["--moving", "x"], "'x' is no finite number of at least 0"),
        ("serving_defaults", ["--rates", "0"], "'0' is no finite number above 0"),
        ("gpu_mesh", ["--mesh", "0x2"], "mesh '0x2' is no shape; write PIPELINExEXPERT"),
        ("mesh", ["--meshes", "1x2,x"], "mesh 'x' is no shape"),
        ("engine_step", ["--batch", "8", "0"], "argument --batch: '0' is no whole number of at least 1"),
        ("scheduler_step", ["--steps", "99"], "'99' is no whole number of at least 100"),
        ("masks", ["--vocabulary", "256"], "'256' is no whole number of at least 257"),
        ("eviction_cost", ["trace", "-1"], "'-1' is no whole number of at least 1"),
        ("eviction_settings", ["a:50", "b:5,0"], "'0' is no whole number of at least 1"),
        ("eviction_settings", ["trace"], "'trace' is no file with numbers behind it, as in FILE:50,200"),
        ("leave_one_out", ["trace:x"], "'x' is no whole number of at least 1"),
        ("leave_one_out", ["5"], "'5' is no file with a number behind it, as in FILE:5"),
        ("prefix_routing", ["trace", "--busy", "0"], "'0' is no finite number above 0"),
        ("routing_decode", ["--mass", "1.5"], "'1.5' is no number above 0 and at most 1"),
    ],
)
def test_arguments_that_cannot_work_are_named(command, name, arguments, sentence):
    code, line = command(name, *arguments)
    assert code == 2
    assert sentence in line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gpu_checkpoint", "{out}/none/yet", "--format", "bf16"], "needs 31.5 GB in {out}/none/yet"),
        (["gpu_session", "load", "--tiny", "--out", "{out}"], "needs 0.00853 GB in {out}"),
        (["gpu_session", "serving", "load", "--keep", "--out", "{out}"], "needs 40.3 GB in {out}"),
    ],
)
def test_a_disk_without_room_is_named_before_anything_is_written(
    command, monkeypatch, tmp_path, arguments, sentence
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=8_000_000))
    code, line = command(*(each.format(out=tmp_path) for each in arguments))
    assert code == 2
    assert sentence.format(out=tmp_path) in line
    assert "its disk has 0.008 GB free; free space" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number_format", ["bf16", "w4a16"])
def test_a_checkpoint_takes_hardly_less_than_is_said(monkeypatch, tmp_path, number_format):
    arguments = ["--shape", "small", "--format", number_format, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["gpu_checkpoint", str(tmp_path), *arguments])
    gpu_checkpoint.main()
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 0.95 * size < gpu_checkpoint.expected_bytes("small", number_format) < 1.05 * size


@pytest.mark.parametrize("ending", ["true", "false"])
@pytest.mark.parametrize("keep", [False, True])
def test_checkpoints_of_a_session_are_removed_unless_they_are_to_be_kept(
    monkeypatch, tmp_path, capsys, ending, keep
):
    part = gpu_session.Part("?", 60, (), ("mkdir {checkpoint}", "touch {checkpoint}/x", ending), "bf16")
    monkeypatch.setattr(gpu_session, "PARTS", {"load": part})
    options = ["load", "--tiny", "--out", str(tmp_path), *(["--keep"] if keep else [])]
    monkeypatch.setattr(sys, "argv", ["gpu_session", *options])
    with contextlib.nullcontext() if ending == "true" else pytest.raises(SystemExit):
        gpu_session.main()
    assert (tmp_path / "load-checkpoint/x").exists() == keep
    said = f"load writes a checkpoint of 0.00853 GB to {tmp_path}/load-checkpoint"
    assert said + ("" if keep else ", and removes it at its end") in capsys.readouterr().out


def test_every_number_of_a_command_has_a_range():
    """`type=int` takes 0 and -1, which end in a traceback later or measure nothing."""
    root = Path(__file__).parents[2]
    files = [
        file for name in ("benchmarks", "examples", "localcluster") for file in (root / name).rglob("*.py")
    ]
    assert files
    unbounded = re.compile(r".*\btype=(?:int|float)\b.*")
    assert [line.strip() for file in files for line in unbounded.findall(file.read_text())] == []


@pytest.mark.parametrize("name", ["eviction_settings", "leave_one_out", "prefix_tree"])
def test_a_trace_that_cannot_be_read_is_named_without_a_traceback(monkeypatch, capsys, tmp_path, name):
    trace = tmp_path / "trace"
    arguments = [str(trace), "5"] if name == "prefix_tree" else [f"{trace}:5"]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {trace}: No such file")


def test_an_error_for_the_user_has_no_traceback(capsys):
    def fails():
        raise SettingsError("device cuda is not available; use cpu")

    with pytest.raises(SystemExit) as ended:
        run(fails)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: device cuda is not available; use cpu\n"
