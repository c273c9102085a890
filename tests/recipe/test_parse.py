"""Recipes are read, or refused in a sentence that says which key and what would be right."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_worker.errors import SettingsError
from moe_worker.recipe.parse import Prune, Quantize, Sparsify, read_recipe

HEAD = "model: dense\nout: small\ndata: train.txt\nvalid: valid.txt\n"


def read(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path)


def test_a_whole_recipe(tmp_path):
    recipe = read(
        tmp_path,
        HEAD
        + """
seed: 3
training: {batch: 8, learning_rate: 2e-3}
steps:
  - prune: {experts: 8, rounds: 2, steps: 10, teacher: dense}
  - sparsify: {pattern: s24, steps: 100, saliency: gradient, learning_rate: 1.0e-3}
  - quantize: {steps: 0, group: 64}
""",
    )
    assert recipe.model == tmp_path / "dense"
    prune, sparsify, quantize = recipe.steps
    assert prune.what == Prune(steps=10, teacher=tmp_path / "dense", experts=8, rounds=2)
    assert sparsify.what == Sparsify(steps=100, pattern="s24", saliency="gradient")
    assert quantize.what == Quantize(steps=0, group=64)
    assert [step.training.learning_rate for step in recipe.steps] == [2e-3, 1e-3, 2e-3]
    assert prune.training.batch == 8


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("steps: []", "model is missing; it must be a path|steps must be a list"),
        (HEAD, "steps must be a list of one or more of prune, finetune, sparsify, quantize"),
        (HEAD + "steps: [{sparsifi: {steps: 3}}]", "step 'sparsifi' is unknown; did you mean 'sparsify'?"),
        (
            HEAD + "steps: [{sparsify: {steps: 3, patern: s14}}]",
            "'patern' is unknown; did you mean 'pattern'?",
        ),
        (
            HEAD + "steps: [{sparsify: {steps: 3, pattern: none}}]",
            "pattern is 'none'; it must be one of s14, s24, or a finetune step to train without one",
        ),
        (HEAD + "steps: [{finetune: {steps: 0}}]", "finetune: steps is 0, which changes nothing; give 1"),
        *(
            (
                HEAD + f"steps: [{{{kind}: {{steps: 0, {key}: {value}}}}}]",
                f"{key} has no effect in 0 steps; give",
            )
            for kind, key, value in (
                ("prune", "teacher", "other"),
                ("quantize", "teacher", "other"),
                ("sparsify", "dense_share", 0.1),
                ("sparsify", "saliency", "gradient"),
            )
        ),
        (
            HEAD + "steps: [{finetune: {steps: 1, teacher: other, teacher_share: 0}}]",
            "teacher has no effect where teacher_share and hidden_share are 0; give one",
        ),
        (
            HEAD + "steps: [{sparsify: {steps: 1, group: 64}}]",
            "group has no effect where w4a8_share is 0; set it, or leave group out",
        ),
        *(
            (
                HEAD + f"steps: [{{{kind}: {{steps: 1, {key}: 1}}}}]",
                rf"steps\[0\].{kind}: {key} has no effect without a teacher; set teacher",
            )
            for kind in ("finetune", "sparsify", "quantize", "prune")
            for key in ("teacher_share", "teacher_top", "hidden_share")
        ),
        (
            HEAD + "steps: [{sparsify: {}}]",
            r"steps\[0\].sparsify: steps is missing; it must be",
        ),
        *(
            (
                HEAD + f"training: {{learning_rate: {number}}}\nsteps: [{{quantize: {{steps: 0}}}}]",
                r"training: learning_rate is .*; it must be a finite number",
            )
            for number in (".nan", "nan", "-.inf", "9" * 400)
        ),
        (
            HEAD + "steps: [{quantize: {steps: many}}]",
            "steps is 'many'; it must be a whole number",
        ),
        (HEAD + "steps: [{quantize: {steps: -1}}]", "steps is -1; it must be a whole number of 0 or more"),
        (HEAD + "sed: 1\nsteps: [{quantize: {steps: 1}}]", "key 'sed' is unknown; did you mean 'seed'?"),
        (HEAD + "training: {bach: 1}\nsteps: [{quantize: {steps: 1}}]", "did you mean 'batch'?"),
        (HEAD + "steps: [{quantize: {steps: 1}}, {finetune: {steps: 1}}]", r"steps\[0\] makes four bits"),
        (HEAD + "steps: [{prune: {steps: 1}, finetune: {steps: 1}}]", "must have one key"),
        *(
            (
                HEAD + f"training: {{{key}: {value}}}\nsteps: [{{quantize: {{steps: 0}}}}]",
                f"training: {key} is .*; it must be",
            )
            for key, value in (
                ("learning_rate", -1),
                ("learning_rate", 0),
                ("batch", 0),
                ("batch", 9 * 10**30),
                ("window", 1),
                ("dropout", 0.95),
                ("weight_decay", -0.1),
                ("decay_share", 1.1),
                ("checkpoint_every", 0),
                ("optimizer", "sgd"),
            )
        ),
        *(
            (
                HEAD + f"steps: [{{{kind}: {{steps: 1, {key}: {value}}}}}]",
                rf"steps\[0\].{kind}: {key} is .*; it must be",
            )
            for kind, key, value in (
                ("prune", "rounds", 0),
                ("prune", "experts", 0),
                ("sparsify", "dense_share", -0.1),
                ("sparsify", "pattern", "s15"),
                ("sparsify", "learning_rate", -2),
                ("quantize", "group", 4),
                ("finetune", "teacher_share", 2),
                ("finetune", "teacher_top", 0),
                ("finetune", "hidden_share", -1),
            )
        ),
        ("seed: -1\n" + HEAD + "steps: [{quantize: {steps: 1}}]", "seed is -1; it must be"),
        (f"seed: {1 << 63}\n" + HEAD + "steps: [{quantize: {steps: 1}}]", "seed is .*; it must be"),
        ("model: [", "is not YAML"),
        ("- a", "must be keys with values, not list"),
    ],
)
def test_bad_recipes_end_in_a_sentence(tmp_path, text, sentence):
    with pytest.raises(SettingsError, match=sentence.replace("?", r"\?")):
        read(tmp_path, text)


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.yaml cannot be read"):
        read_recipe(tmp_path / "none.yaml")


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_is_a_recipe_or_a_sentence(tmp_path_factory, text):
    path = Path(tmp_path_factory.getbasetemp()) / "any.yaml"
    path.write_text(HEAD + text, encoding="utf-8")
    with pytest.raises(SettingsError):
        read_recipe(path)
