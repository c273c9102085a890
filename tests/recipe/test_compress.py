"""A whole recipe on a tiny model: pruned, sparse, four bits; interrupted, refused, and served."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import SafetensorError

import moe_worker
from moe_worker import files
from moe_worker.errors import DataError, SettingsError, WorkerError
from moe_worker.recipe import run
from moe_worker.recipe.cli import compress
from moe_worker.recipe.parse import read_recipe
from moe_worker.train.evaluate import score_checkpoint
from moe_worker.train.settings import TrainSettings
from moe_worker.train.trainer import train
from tests.train.conftest import CONFIG, text_file

__all__ = ["text_file"]
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 128, "v_head_dim": 16}
SHAPE |= {"n_group": 2, "topk_group": 1}
STEPS = """
  - prune: {experts: 4, channels: 64, rounds: 2, steps: 6, batches: 2, teacher: dense, teacher_top: 4}
  - sparsify: {pattern: s14, steps: 20, saliency: gradient}
  - quantize: {steps: 5, group: 64}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file):
    """A trained model, its text, and a recipe."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **SHAPE}))
    dense = TrainSettings(data=text_file, config=folder / "config.json", out=folder / "dense", steps=40,
                          batch=4, window=32, warmup=4, dropout=0.0, device="cpu")  # fmt: skip
    train(dense)
    write_recipe(folder, text_file, "small", STEPS)
    return folder


def write_recipe(folder, text_file, out, steps):
    path = folder / f"{out}.yaml"
    path.write_text(
        f"model: dense\nout: {out}\ndata: {text_file}\nvalid: {text_file}\ndevice: cpu\n"
        f"training: {{batch: 4, window: 32, dropout: 0.0, learning_rate: 4e-3}}\nsteps:{steps}"
    )
    return path


def test_a_recipe_goes_on_where_it_stopped_and_its_checkpoint_scores_as_its_report_says(
    folder, text_file, monkeypatch
):
    recipe = folder / "small.yaml"
    calls, whole = [], run.train

    def stopping(settings):
        calls.append(settings.out.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(settings)

    monkeypatch.setattr(run, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        list(run.run_steps(read_recipe(recipe)))
    result = CliRunner().invoke(compress, [str(recipe), "--threads", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    assert calls == ["round-1", "round-2", "step-2-sparsify", "step-2-sparsify", "step-3-quantize"]
    rows = json.loads((folder / "small" / "report.json").read_text())
    assert [row["step"] for row in rows] == ["start", "prune", "sparsify", "quantize"]
    assert rows[1]["parameters_total"] < rows[0]["parameters_total"]
    last = folder / "small" / "step-3-quantize"
    assert rows[3]["nbytes"]["positions"] * 2 + rows[3]["nbytes"]["values"] > 0
    assert "quality.png" in (folder / "small" / "report.md").read_text()
    served = score_checkpoint(last, text_file, context=32, device="cpu", dtype="float32").bits_per_byte
    assert served == pytest.approx(rows[3]["bits_per_byte"], rel=0.02)
    assert moe_worker.Engine(last).generate(["the kernel"])[0].text
    quality = json.loads((last / "quality.json").read_text())
    assert quality["bits_per_byte"]["before"] == rows[0]["bits_per_byte"]


def test_other_settings_for_a_step_that_is_done_are_refused(folder, text_file):
    write_recipe(folder, text_file, "twice", "\n  - finetune: {steps: 1}")
    list(run.run_steps(read_recipe(folder / "twice.yaml")))
    write_recipe(folder, text_file, "twice", "\n  - finetune: {steps: 2}")
    with pytest.raises(
        SettingsError, match="was created from other settings, texts or checkpoints than those of finetune"
    ):
        list(run.run_steps(read_recipe(folder / "twice.yaml")))


def changed(path, text):
    path.write_text(text)
    return path


def test_another_text_to_score_is_no_result_of_before(folder, text_file, tmp_path):
    steps = "\n  - finetune: {steps: 1}"
    valid = changed(tmp_path / "valid.txt", "one text")
    recipe = read_recipe(write_recipe(folder, text_file, "scored", steps))
    recipe = replace(recipe, valid=valid)
    before = next(run.run_steps(recipe))[2]
    assert next(run.run_steps(recipe))[2] == before
    list(run.run_steps(recipe))
    changed(valid, "quite another text, of other words")
    again = run.run_steps(recipe)
    assert next(again)[2] != before
    with pytest.raises(
        SettingsError, match="was created from other settings, texts or checkpoints than those of finetune"
    ):
        next(again)


def test_an_interrupted_step_of_other_settings_is_refused(folder, text_file, monkeypatch):
    """Its rounds of pruning lie there, made by what the recipe said before."""
    prune = "\n  - prune: {{experts: {experts}, rounds: 2, steps: 2, batches: 1}}"
    write_recipe(folder, text_file, "half", prune.format(experts=4))

    def stop(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        list(run.run_steps(read_recipe(folder / "half.yaml")))
    write_recipe(folder, text_file, "half", prune.format(experts=6))
    with pytest.raises(SettingsError, match="was created from other settings"):
        list(run.run_steps(read_recipe(folder / "half.yaml")))


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        (
            "\n  - quantize: {steps: 1}",
            r"\[0\].quantize: .* has 64 inputs, which groups of 128 do not",
        ),
        (
            "\n  - prune: {steps: 1, experts: 3}",
            r"steps\[0\].prune: experts is 3; it must be a multiple",
        ),
        (
            f"\n  - prune: {{steps: 1, experts: {CONFIG['n_routed_experts']}}}",
            r"steps\[0\].prune: no size is smaller than the model's; give one, or use a finetune step",
        ),
        ("\n  - sparsify: {steps: 1, pattern: s15}", r"steps\[0\].sparsify: pattern is 's15'"),
        (
            "\n  - finetune: {steps: 1}\n  - finetune: {steps: 1, teacher: nowhere}",
            r"steps\[1\].finetune: .*nowhere/tokenizer.json",
        ),
    ],
)
def test_what_cannot_work_is_told_before_a_step(folder, text_file, steps, sentence):
    write_recipe(folder, text_file, "wrong", steps)
    with pytest.raises(SettingsError, match=sentence):
        next(run.run_steps(read_recipe(folder / "wrong.yaml")))
    assert not (folder / "wrong").exists()


def test_a_text_that_is_not_there_is_told_before_a_step(folder, text_file):
    write_recipe(folder, text_file, "textless", "\n  - finetune: {steps: 1}")
    recipe = replace(read_recipe(folder / "textless.yaml"), valid=folder / "nowhere.txt")
    with pytest.raises(DataError, match=r"nowhere\.txt: cannot be read"):
        next(run.run_steps(recipe))
    assert not (folder / "textless").exists()


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_text(path, "old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        WorkerError, match=r"could not be written \(No space left on device\); the previous file"
    ):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def _write_in_vain(path):
    with files.replacing(path) as beside:
        beside.write_text("half")
        raise SafetensorError("No space left on device")  # as safetensors' save_file does


def test_a_disk_that_takes_no_more_is_a_sentence(tmp_path):
    with pytest.raises(WorkerError, match=r"weights could not be written \(No space left on device\)"):
        _write_in_vain(tmp_path / "weights")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WorkerError, match=r"/dev/full could not be written \(No space left on device\)"):
        files.append_text(Path("/dev/full"), "a line\n")
    with pytest.raises(WorkerError, match=r"/dev/full/.* could not be written"):
        files.make_folder(Path("/dev/full/out"))


def test_a_step_without_training_only_rounds(folder, text_file):
    write_recipe(folder, text_file, "rounded", "\n  - quantize: {steps: 0, group: 64}")
    start, rounded = list(run.run_steps(read_recipe(folder / "rounded.yaml")))
    assert rounded[2] != start[2]
    again = replace(read_recipe(folder / "rounded.yaml"), seed=0)
    assert [row[2] for row in run.run_steps(again)] == [start[2], rounded[2]]
