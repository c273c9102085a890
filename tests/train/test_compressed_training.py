"""Runs with sparsity, with four bits, and with a teacher."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moe_worker.errors import DataError, DivergedError, SettingsError
from moe_worker.quant import compressed_tensors, sparse14
from moe_worker.train.experts import experts_at_once, grouped_experts, sequence_balance
from moe_worker.train.settings import TrainSettings
from moe_worker.train.trainer import TrainingRun, train

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "v_head_dim": 16}


@pytest.fixture
def run_settings(tmp_path, write_config, text_file):
    return TrainSettings(
        data=text_file,
        config=write_config(**SHAPE),
        out=tmp_path / "run",
        steps=20,
        batch=4,
        window=32,
        warmup=2,
        dropout=0.0,
        group=64,
        device="cpu",
    )


def kept_of_four(weight):
    return int((weight != 0).unflatten(-1, (-1, 4)).sum(-1).max())


@pytest.mark.parametrize(("pattern", "most"), [("s14", 1), ("s24", 2)])
@pytest.mark.parametrize("saliency", ["magnitude", "gradient"])
def test_a_sparse_run_writes_weights_in_its_pattern(run_settings, pattern, most, saliency):
    settings = replace(run_settings, sparsity=pattern, saliency=saliency)
    train(settings)
    tensors = load_file(settings.out / "model.safetensors")
    for name in ("layers.0.mlp.down_proj", "layers.1.self_attn.o_proj", "layers.1.mlp.experts.3.up_proj"):
        assert kept_of_four(tensors[f"model.{name}.weight"]) == most
    for name in ("embed_tokens", "layers.1.mlp.gate", "layers.1.self_attn.kv_b_proj"):
        assert kept_of_four(tensors[f"model.{name}.weight"]) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": "s14", "saliency": "gradient", "w4a8_share": 0.5},
        {"w4a8_share": 0.5, "optimizer": "adamw"},
        {"sparsity": "s24", "dense_share": 0.0, "shrink_share": 0.0},
    ],
)
def test_an_interrupted_compressed_run_goes_on_to_the_very_same_weights(run_settings, tmp_path, changes):
    settings = replace(run_settings, steps=5, dropout=0.1, **changes)
    train(settings)
    stopping = replace(settings, out=tmp_path / "stopping", stop_after=0.0)
    for _ in range(settings.steps):
        train(stopping)
    whole, pieces = (load_file(run.out / "model.safetensors") for run in (settings, stopping))
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_four_bits_are_packed_as_compressed_tensors_packs_them(run_settings):
    settings = replace(run_settings, w4a8_share=0.5)
    train(settings)
    tensors = load_file(settings.out / "model.safetensors")
    config = json.loads((settings.out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    stem = "model.layers.1.mlp.experts.0.down_proj."
    parts = {name.removeprefix(stem): value for name, value in tensors.items() if name.startswith(stem)}
    weight = compressed_tensors.from_tensors(parts, 64, 64)
    assert weight.values().abs().max() <= 7
    assert "lm_head.weight_packed" in tensors
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_sparse_four_bits_are_packed_as_s14(run_settings):
    settings = replace(run_settings, w4a8_share=0.2, sparsity="s14")
    run = TrainingRun(settings)
    run.run()
    tensors = load_file(settings.out / "model.safetensors")
    stem = "model.layers.1.self_attn.o_proj."
    parts = {name.removeprefix(stem): value for name, value in tensors.items() if name.startswith(stem)}
    weight = sparse14.from_tensors(parts, 64, 64)
    with torch.no_grad():
        trained = run.learner.effective()
    assert torch.equal(weight.dequantize(torch.float32), trained["layers.1.self_attn.o_proj.weight"])
    expansion = "layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(tensors[f"model.{expansion}"].float(), trained[expansion])
    assert not torch.equal(trained[expansion], run.learner.model.get_parameter(expansion))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"group": 48}, "inputs, which groups of 48 do not fill; choose group 64"),
        ({"sparsity": "s11"}, "sparsity is 's11'; it must be one of none, s14, s24"),
        ({"dense_share": 0.7}, "dense_share and shrink_share make 1.3 of the steps"),
        ({"hidden_share": 0.1}, "hidden_share is 0.1, but there is no teacher; set teacher"),
    ],
)
def test_what_cannot_be_compressed_so_is_told_before_a_step(run_settings, changes, sentence):
    with pytest.raises(SettingsError, match=sentence):
        train(replace(run_settings, **{"w4a8_share": 0.5, **changes}))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_state(run_settings):
    settings = replace(run_settings, checkpoint_every=5, steps=12, warmup=0)
    run = TrainingRun(settings)
    step, poisoned = run.learner.step, []

    def poison(number, *arguments, **named):
        if number == 7:
            poisoned.append((settings.out / "state.safetensors").read_bytes())
            with torch.no_grad():
                run.learner.model.norm.weight.fill_(float("nan"))
        step(number, *arguments, **named)

    run.learner.step = poison
    with pytest.raises(DivergedError, match="the loss at step 8 is not a finite number"):
        run.run()
    assert (settings.out / "state.safetensors").read_bytes() == poisoned[0]
    assert not (settings.out / "model.safetensors").exists()
    train(settings)  # goes on from the kept state


def test_a_teacher_is_asked_once_and_its_answers_are_kept(run_settings, tmp_path, text_file):
    teacher = replace(run_settings, out=tmp_path / "teacher")
    train(teacher)
    student = replace(run_settings, teacher=teacher.out, teacher_top=8, steps=3, hidden_share=0.1,
                      tokenizer=teacher.out / "tokenizer.json", out=tmp_path / "student")  # fmt: skip
    run = TrainingRun(student)
    cached = run.teacher
    places = run.sampler.places(0)
    inputs, _ = run.sampler.at(0)
    view = cached.view(places, inputs)
    assert view.ids_BTC.shape == (4, 32, 8)
    assert (view.logprobs_BTC.exp().sum(-1) <= 1.01).all()
    # The first window of the stream has no more context than the teacher had when it was asked.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = cached.model.logits(torch.from_numpy(run.corpus.stream_N[None, :32]).long())
    assert logits[0].argmax(-1).tolist() == cached.ids_NC[:32, 0].tolist()
    assert (cached.logprobs_NC < 0).all()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("teacher-*.npy")}
    run.run()
    again = TrainingRun(replace(student, out=tmp_path / "second"))
    assert np.array_equal(again.teacher.ids_NC, cached.ids_NC)
    assert len(before) == 2


def test_a_teacher_with_another_tokenizer_is_refused(run_settings, tmp_path, write_config):
    teacher = replace(run_settings, out=tmp_path / "teacher", steps=1)
    train(teacher)
    write_config(**SHAPE, vocab_size=300)
    with pytest.raises(DataError, match="cannot teach: its tokenizer has 319 tokens, the student's 300"):
        train(replace(run_settings, teacher=teacher.out))


def test_both_ways_of_computing_experts_are_one_function_with_the_same_gradients():
    torch.manual_seed(0)
    x = torch.randn(20, 16, requires_grad=True)
    weights = [torch.randn(*shape, requires_grad=True) for shape in ((6, 8, 16), (6, 8, 16), (6, 16, 8))]
    scores = torch.rand(20, 6)
    chosen = scores.topk(2).indices
    results = []
    for way in (grouped_experts, experts_at_once):
        out = way(x, tuple(weights), (chosen, scores.gather(1, chosen)), False)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *weights])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_the_loss_of_sequences_is_one_where_experts_share_evenly_and_more_where_not():
    even = torch.full((1, 4, 4), 0.5)
    chosen = torch.tensor([[[0, 1], [2, 3], [0, 1], [2, 3]]])
    assert sequence_balance(even, chosen) == pytest.approx(1.0)
    lopsided = torch.tensor([0.9, 0.9, 0.1, 0.1]).expand(1, 4, 4)
    assert sequence_balance(lopsided, torch.zeros_like(chosen) + torch.tensor([0, 1])) > 1.5
