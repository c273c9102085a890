"""A recipe: a checkpoint, texts, and the steps that make the checkpoint smaller."""

from __future__ import annotations

import contextlib
import difflib
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from moe_worker.errors import CheckpointError, SettingsError
from moe_worker.reading import read_file
from moe_worker.train.settings import OPTIMIZERS, RANGES, SALIENCIES, SPARSITIES, Range

LARGEST_RECIPE = 1 << 20
_RANGES = RANGES | dict.fromkeys(
    ("rounds", "batches", "layers", "heads", "experts", "channels", "dense_channels"), Range(1, 1 << 24)
)
PATTERNS = tuple(name for name in SPARSITIES if name != "none")
_CHOICES = {"optimizer": OPTIMIZERS, "pattern": PATTERNS, "saliency": SALIENCIES}
_OF_TEACHER = ("teacher_share", "teacher_top", "hidden_share")
_OF_TRAINING = ("teacher", "dense_share", "shrink_share", "saliency")


@dataclass(frozen=True)
class Training:
    """Training settings of a recipe; a step may override them."""

    batch: int = 16
    window: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    optimizer: str = "muon"
    warmup: int = 20
    decay_share: float = 0.6
    checkpoint_every: int = 500


@dataclass(frozen=True)
class Finetune:
    """Training without compression, or with a teacher (distillation)."""

    steps: int
    teacher: Path | None = None
    teacher_share: float = 0.5
    teacher_top: int = 16
    hidden_share: float = 0.0


@dataclass(frozen=True)
class Sparsify(Finetune):
    """Training into a sparsity pattern. With 0 steps the mask is chosen by magnitude, without training."""

    pattern: str = "s14"
    dense_share: float = 0.2
    shrink_share: float = 0.6
    saliency: str = "magnitude"
    w4a8_share: float = 0.0
    group: int = 128


@dataclass(frozen=True)
class Quantize(Finetune):
    """Quantization-aware training with int4 weights and int8 activations; with 0 steps rounding only. Zeros
    of an earlier pattern stay.
    """

    group: int = 128


@dataclass(frozen=True)
class Prune(Finetune):
    """Smaller sizes, reached in `rounds`, each with its share of the steps; sizes that are not named stay."""

    rounds: int = 1
    batches: int = 16
    layers: int | None = None
    heads: int | None = None
    experts: int | None = None
    channels: int | None = None
    dense_channels: int | None = None


KINDS: dict[str, type[Finetune]] = {
    "prune": Prune,
    "finetune": Finetune,
    "sparsify": Sparsify,
    "quantize": Quantize,
}


@dataclass(frozen=True)
class RecipeStep:
    """One step: its kind, its settings, and overrides of the training settings."""

    kind: str
    what: Finetune
    training: Training


@dataclass(frozen=True)
class Recipe:
    """A recipe; paths are relative to its own folder."""

    model: Path
    out: Path
    data: Path
    valid: Path
    steps: tuple[RecipeStep, ...]
    seed: int = 0
    device: str = "auto"


def read_recipe(path: Path) -> Recipe:
    """Reads and checks a YAML file. Raises SettingsError, which names the key and the remedy."""
    try:
        values = yaml.safe_load(read_file(path, LARGEST_RECIPE))
    except CheckpointError as error:
        raise SettingsError(f"{path} cannot be read ({error}); give a YAML file") from error
    except RecursionError as error:
        raise SettingsError(f"{path} is nested too deeply; write it as docs/compression.md shows") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    given = dict(_mapping(values, str(path)))
    steps, training = given.pop("steps", None), given.pop("training", {})
    shared = _build(Training, training, f"{path}: training", path.parent)
    if not isinstance(steps, list) or not steps:
        raise SettingsError(f"{path}: steps must be a list of one or more of {', '.join(KINDS)}")
    made = tuple(_step(step, f"{path}: steps[{i}]", path.parent, shared) for i, step in enumerate(steps))
    recipe: Recipe = _build(Recipe, given, str(path), path.parent, steps=made)
    _check_order(recipe, path)
    return recipe


def _step(values: Any, where: str, folder: Path, shared: Training) -> RecipeStep:
    entry = _mapping(values, where)
    if len(entry) != 1:
        raise SettingsError(f"{where} must have one key, one of {', '.join(KINDS)}, with the step's settings")
    [(kind, settings)] = entry.items()
    if kind not in KINDS:
        raise SettingsError(f"{where}: step {kind!r} is unknown{_guess(kind, KINDS)}")
    given = dict(_mapping({} if settings is None else settings, f"{where}.{kind}"))
    own = {key: given.pop(key) for key in list(given) if key in _names(Training)}
    merged = {name: getattr(shared, name) for name in _names(Training)} | own
    what = _build(KINDS[kind], given, f"{where}.{kind}", folder, also=_names(Training))
    _check_effect(what, given, f"{where}.{kind}")
    return RecipeStep(kind, what, _build(Training, merged, f"{where}.{kind}", folder))


def _check_effect(what: Finetune, given: dict[str, Any], where: str) -> None:
    """Refuses settings without effect."""
    if type(what) is Finetune and not what.steps:
        raise SettingsError(
            f"{where}: steps is 0, which changes nothing; give 1 or more, or leave the step out"
        )
    if what.teacher is None and (unused := [key for key in _OF_TEACHER if key in given]):
        raise SettingsError(
            f"{where}: {unused[0]} has no effect without a teacher; set teacher, or leave it out"
        )
    if not what.steps and (unused := [key for key in _OF_TRAINING if given.get(key) is not None]):
        raise SettingsError(
            f"{where}: {unused[0]} has no effect in 0 steps; give more steps, or leave it out"
        )
    if what.teacher is not None and not what.teacher_share and not what.hidden_share:
        raise SettingsError(
            f"{where}: teacher has no effect where teacher_share and hidden_share are 0; give one, or "
            "leave it out"
        )
    if isinstance(what, Sparsify) and "group" in given and not what.w4a8_share:
        raise SettingsError(f"{where}: group has no effect where w4a8_share is 0; set it, or leave group out")


def _check_order(recipe: Recipe, path: Path) -> None:
    """Refuses steps after quantization: packed weights are not trained further."""
    for index, step in enumerate(recipe.steps[:-1]):
        packs = step.kind == "quantize" or (isinstance(step.what, Sparsify) and step.what.w4a8_share)
        if packs:
            raise SettingsError(
                f"{path}: steps[{index}] makes four bits, which no step can train on; put it last"
            )


def _build(
    kind: type[Any], given: dict[str, Any], where: str, folder: Path, also: tuple[str, ...] = (), **made: Any
) -> Any:
    """Builds a dataclass from checked values; `folder` makes paths absolute."""
    allowed = {entry.name: entry for entry in fields(kind) if entry.name not in made}
    for key in given:
        if key not in allowed:
            raise SettingsError(f"{where}: key {key!r} is unknown{_guess(str(key), (*allowed, *also))}")
    for name, entry in allowed.items():
        if name not in given and entry.default is MISSING and entry.default_factory is MISSING:
            raise SettingsError(f"{where}: {name} is missing; it must be {_words(str(entry.type))}")
    values = {
        key: _value(value, str(allowed[key].type), f"{where}: {key}", folder) for key, value in given.items()
    }
    for key, value in values.items():
        numbers, words = _RANGES.get(key), _CHOICES.get(key)
        if numbers is not None and value is not None and value not in numbers:
            raise SettingsError(f"{where}: {key} is {value!r}; it must be {numbers}")
        if words is not None and value not in words:
            instead = ", or a finetune step to train without one" if key == "pattern" else ""
            raise SettingsError(f"{where}: {key} is {value!r}; it must be one of {', '.join(words)}{instead}")
    return kind(**values, **made)


def _value(value: Any, wanted: str, where: str, folder: Path) -> Any:
    if value is None and "None" in wanted:
        return None
    if "Path" in wanted and isinstance(value, str):
        return (folder / value).resolve()
    if "float" in wanted and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)  # YAML takes 2e-3 for text
            if math.isfinite(number):
                return number
    if wanted.startswith("int") and type(value) is int and value >= 0:
        return value
    if wanted == "str" and isinstance(value, str):
        return value
    raise SettingsError(f"{where} is {value!r}; it must be {_words(wanted)}")


def _words(wanted: str) -> str:
    for kind, words in (
        ("Path", "a path"),
        ("float", "a finite number"),
        ("int", "a whole number of 0 or more"),
    ):
        if kind in wanted:
            return words
    return "a word"


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SettingsError(f"{where} must be keys with values, not {type(value).__name__}")
    return value


def _guess(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(entry.name for entry in fields(kind))
