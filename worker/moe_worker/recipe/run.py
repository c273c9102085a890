"""Runs the steps of a recipe, each in its own folder; completed steps are not repeated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from moe_worker.config.directory import read_json
from moe_worker.config.model import parse_model_config
from moe_worker.engine.loading import choose_device
from moe_worker.errors import InputError, SettingsError, WorkerError
from moe_worker.files import copy_file, digest, make_folder, write_text
from moe_worker.recipe.parse import Prune, Quantize, Recipe, RecipeStep, Sparsify
from moe_worker.train.compression import Compression
from moe_worker.train.corpus import read_corpus
from moe_worker.train.data import WindowSampler, read_documents, read_tokenizer
from moe_worker.train.metrics import METRICS_FILE, read_rows, scores
from moe_worker.train.model import TrainingModel
from moe_worker.train.prune import prune_checkpoint
from moe_worker.train.settings import TrainSettings
from moe_worker.train.sizes import ModelSizes
from moe_worker.train.state import read_tensors
from moe_worker.train.teacher import check_teacher
from moe_worker.train.trainer import TrainingRun, train

INPUTS = "inputs.json"
DONE = "done.json"
CHECKPOINT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


def run_steps(recipe: Recipe) -> Iterator[tuple[str, Path, float]]:
    """Yields each completed step, its checkpoint folder and its bits per byte on the validation text.

    The first is the checkpoint that the recipe starts from. Raises WorkerError.
    """
    check_recipe(recipe)
    make_folder(recipe.out)
    yield "start", recipe.model, _score_start(recipe)
    folder, pattern = recipe.model, "none"
    for index, step in enumerate(recipe.steps):
        made = recipe.out / f"step-{index + 1}-{step.kind}"
        if isinstance(step.what, Sparsify):
            pattern = step.what.pattern
        score = _run_step(recipe, step, folder, made, pattern)
        folder = made
        yield step.kind, folder, score


def check_recipe(recipe: Recipe) -> None:
    """Checks everything that can be checked before hours of work: texts, sizes, groups, patterns, teachers.

    Raises WorkerError.
    """
    config = read_json(recipe.model / "config.json")
    for text in (recipe.data, recipe.valid):
        read_documents(text)
    for index, step in enumerate(recipe.steps):
        where = f"steps[{index}].{step.kind}"
        if isinstance(step.what, Prune):
            goal = _goal(config, step.what)
            with _naming(where):
                ModelSizes.of(config).check(goal, config)
                if goal == ModelSizes.of(config):
                    raise SettingsError(
                        "no size is smaller than the model's; give one, or use a finetune step"
                    )
            config = goal.write(config)
        with _naming(where):
            _check_shape(recipe, step, config)
            _check_teacher(recipe, step, config)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise SettingsError(f"{where}: {error}") from error


def _check_shape(recipe: Recipe, step: RecipeStep, config: dict[str, object]) -> None:
    """Checks the compression of a step on a model without memory."""
    with torch.device("meta"):
        model = TrainingModel(parse_model_config(config, str(recipe.model)), dropout=0.0)
        Compression(model, _settings(recipe, step, recipe.model, recipe.out, "none"))


def _check_teacher(recipe: Recipe, step: RecipeStep, config: dict[str, object]) -> None:
    """Checks a teacher; one that an earlier step creates is checked once it exists."""
    teacher = step.what.teacher
    if teacher is None or (teacher.is_relative_to(recipe.out) and not teacher.exists()):
        return
    size = parse_model_config(config, str(recipe.model)).hidden_size
    tokenizer = read_tokenizer(recipe.model / "tokenizer.json")
    check_teacher(teacher, tokenizer, size if step.what.hidden_share else None)


def _settings(recipe: Recipe, step: RecipeStep, source: Path, out: Path, pattern: str) -> TrainSettings:
    """The training settings of a step."""
    what = step.what
    settings = TrainSettings(
        data=recipe.data,
        valid=recipe.valid,
        out=out,
        config=source / "config.json",
        start_from=source,
        cache=recipe.out,
        seed=recipe.seed,
        device=recipe.device,
        evaluate_every=max(1, what.steps),
        steps=what.steps,
        teacher=what.teacher,
        teacher_share=what.teacher_share,
        teacher_top=what.teacher_top,
        hidden_share=what.hidden_share,
        **{field.name: getattr(step.training, field.name) for field in fields(step.training)},
    )
    if isinstance(what, Sparsify):
        settings = replace(
            settings,
            sparsity=what.pattern,
            dense_share=what.dense_share if what.steps else 0.0,
            shrink_share=what.shrink_share if what.steps else 0.0,
            saliency=what.saliency,
            w4a8_share=what.w4a8_share,
            group=what.group,
        )
    elif pattern != "none" and not isinstance(what, Prune):
        settings = replace(settings, sparsity=pattern, dense_share=0.0, shrink_share=0.0)
    if isinstance(what, Quantize):
        settings = replace(settings, w4a8_share=1.0, group=what.group)
    return settings


def _run_step(recipe: Recipe, step: RecipeStep, source: Path, made: Path, pattern: str) -> float:
    """Runs a step unless its folder is complete and has the same inputs; returns its bits per byte."""
    _claim(made, {"step": asdict(step), **_inputs(recipe, source, step)}, step.kind)
    if (made / DONE).exists():
        return float(read_json(made / DONE)["bits_per_byte"])
    if isinstance(step.what, Prune):
        last = prune_step(recipe, step, step.what, source, made)
        for name in (*CHECKPOINT_FILES, METRICS_FILE):
            copy_file(last / name, made / name)
    else:
        train(_settings(recipe, step, source, made, pattern))
    score = _last_score(made)
    write_text(made / DONE, json.dumps({"bits_per_byte": score}))
    return score


def _claim(made: Path, inputs: dict[str, object], kind: str) -> None:
    """Records the inputs of a step in its folder; raises SettingsError if it has other inputs."""
    make_folder(made)
    key = json.loads(json.dumps(inputs, default=str))
    if (made / INPUTS).exists() and read_json(made / INPUTS) != key:
        raise SettingsError(
            f"{made} was created from other settings, texts or checkpoints than those of {kind}; "
            "choose another `out`, or remove it"
        )
    write_text(made / INPUTS, json.dumps(key, indent=2))


def _inputs(recipe: Recipe, source: Path, step: RecipeStep | None = None) -> dict[str, str | int | None]:
    """Inputs of a result in addition to the settings of its step: files, by their content."""
    teacher = step.what.teacher if step else None
    return {
        "from": digest(source / "model.safetensors"),
        "data": digest(recipe.data),
        "valid": digest(recipe.valid),
        "teacher": digest(teacher / "model.safetensors") if teacher else None,
        "seed": recipe.seed,
    }


def prune_step(recipe: Recipe, step: RecipeStep, what: Prune, source: Path, made: Path) -> Path:
    """Rounds of pruning and fine-tuning below `made`; returns the folder of the last. Raises WorkerError."""
    start = read_json(source / "config.json")
    goal = _goal(start, what)
    for number in range(1, what.rounds + 1):
        sizes = ModelSizes.of(start).towards(goal, number / what.rounds, start)
        cut, tuned = made / f"round-{number}-cut", made / f"round-{number}"
        if not (cut / "config.json").exists():  # written last
            prune_checkpoint(source, cut, sizes, _sampler(recipe, step, source), what.batches)
        share = what.steps * number // what.rounds - what.steps * (number - 1) // what.rounds
        tuning = _settings(recipe, step, cut, tuned, "none")
        if not (tuned / "config.json").exists():
            train(replace(tuning, steps=share, evaluate_every=max(1, share)))
        source = tuned
    return source


def _goal(config: dict[str, object], what: Prune) -> ModelSizes:
    now = ModelSizes.of(config)
    named = {entry.name: getattr(what, entry.name) for entry in fields(ModelSizes)}
    return replace(now, **{name: value for name, value in named.items() if value is not None})


def _sampler(recipe: Recipe, step: RecipeStep, source: Path) -> WindowSampler:
    settings = _settings(recipe, step, source, recipe.out, "none")
    vocabulary = int(read_json(source / "config.json")["vocab_size"])
    stream_N = torch.from_numpy(read_corpus(replace(settings, valid=None), vocabulary).stream_N)
    device = choose_device(recipe.device)
    return WindowSampler(stream_N.to(device), settings.window, settings.batch, recipe.seed)


def _score_start(recipe: Recipe) -> float:
    """Bits per byte of the original checkpoint, stored with the steps."""
    kept, training = recipe.out / "start.json", recipe.steps[0].training
    read_tensors(recipe.model / "model.safetensors")  # named first where it is missing
    key = json.dumps({"window": training.window, **_inputs(recipe, recipe.model)}, sort_keys=True)
    if kept.exists() and (before := read_json(kept)).get("key") == key:
        return float(before["bits_per_byte"])
    settings = TrainSettings(
        data=recipe.data,
        valid=recipe.valid,
        out=recipe.out / "start",
        cache=recipe.out,
        config=recipe.model / "config.json",
        start_from=recipe.model,
        steps=0,
        batch=training.batch,
        window=training.window,
        device=recipe.device,
    )
    run = TrainingRun(settings)
    score = run.score(run.corpus.valid)
    if score is None:
        raise WorkerError("the text to score cannot be scored")
    write_text(kept, json.dumps({"key": key, "bits_per_byte": score.bits_per_byte}))
    return score.bits_per_byte


def _last_score(folder: Path) -> float:
    return scores(read_rows(folder / METRICS_FILE))[-1][1]
