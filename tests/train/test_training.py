import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_worker
from moe_worker import progress
from moe_worker.config import read_model_config
from moe_worker.errors import CheckpointError, DataError, InputError
from moe_worker.train import data
from moe_worker.train.blocks import MixtureOfExperts
from moe_worker.train.model import TrainingModel
from moe_worker.train.names import load_checkpoint_tensors, named_tensors, untied_state
from moe_worker.train.settings import TrainSettings
from moe_worker.train.trainer import train


@pytest.fixture
def run_settings(tmp_path, write_config, text_file):
    return TrainSettings(
        data=text_file,
        config=write_config(),
        out=tmp_path / "run",
        steps=60,
        batch=8,
        window=32,
        warmup=5,
        checkpoint_every=7,
        device="cpu",
    )


def metrics(settings):
    return [json.loads(line) for line in (settings.out / "metrics.jsonl").read_text().splitlines()]


def test_training_learns_and_writes_what_the_engine_serves(run_settings, text_file):
    settings = replace(run_settings, valid=text_file, evaluate_every=10)
    train(settings)
    scores = [row["valid_bits_per_byte"] for row in metrics(settings) if "valid_bits_per_byte" in row]
    assert len(scores) == 6
    assert scores[-1] < scores[0]
    losses = [row["loss"] for row in metrics(settings) if "loss" in row]
    assert losses[-1] < 0.6 * math.log(320)  # that of a model that knows nothing
    assert (settings.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert moe_worker.Engine(settings.out).generate(["the kernel maps"])[0].text


def test_progress_is_shown_while_text_is_encoded_and_scored(run_settings, text_file, monkeypatch, capsys):
    monkeypatch.setattr(progress, "TRANSIENT_AFTER_S", 0.0)
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    monkeypatch.setattr(data, "ENCODED_TOGETHER", 2000)
    train(replace(run_settings, valid=text_file, steps=0))
    lines = capsys.readouterr().err.splitlines()
    for done in ("encode", "score"):
        percents = [int(line.split()[1]) for line in lines if line.startswith(f"{done}: ")]
        assert any(0 < percent < 100 for percent in percents), done


def test_an_interrupted_run_goes_on_to_the_very_same_weights(run_settings, tmp_path):
    settings = replace(run_settings, steps=4)
    train(settings)
    stopping = replace(settings, out=tmp_path / "stopping", stop_after=0.0)
    for _ in range(settings.steps):
        assert not (stopping.out / "model.safetensors").exists()
        train(stopping)  # one step each
    whole, pieces = (load_file(run.out / "model.safetensors") for run in (settings, stopping))
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_a_state_of_other_settings_is_refused(run_settings):
    train(replace(run_settings, steps=3, stop_after=0.0))
    with pytest.raises(CheckpointError, match="belongs to a run with other settings"):
        train(replace(run_settings, steps=3, batch=4))


def test_a_state_of_another_text_is_refused(run_settings, tmp_path):
    train(replace(run_settings, steps=3, stop_after=0.0))
    other = tmp_path / "other.txt"
    other.write_text(run_settings.data.read_text() + "\0one more document")
    with pytest.raises(CheckpointError, match="belongs to a run with other settings"):
        train(replace(run_settings, steps=3, data=other))


def test_a_state_of_another_teacher_is_refused_and_the_same_one_may_move(run_settings, tmp_path):
    one = train(replace(run_settings, steps=1, out=tmp_path / "one"))
    settings = replace(run_settings, steps=1, tokenizer=one / "tokenizer.json")
    other = train(replace(settings, seed=1, out=tmp_path / "other"))
    settings = replace(settings, steps=3, stop_after=0.0, teacher=one)
    train(settings)
    with pytest.raises(CheckpointError, match="belongs to a run with other settings"):
        train(replace(settings, teacher=other))
    moved = one.rename(tmp_path / "moved")
    train(replace(settings, teacher=moved, tokenizer=moved / "tokenizer.json"))


def test_a_state_of_other_labels_is_refused_where_they_count(run_settings, tmp_path):
    labels = tmp_path / "labels.txt"
    documents = len(data.read_documents(run_settings.data))
    labels.write_text("man\nwiki\n" + "man\n" * (documents - 2))
    settings = replace(run_settings, steps=3, stop_after=0.0, domains=labels, domain_share=0.1)
    train(settings)
    labels.write_text("wiki\nman\n" + "man\n" * (documents - 2))
    with pytest.raises(CheckpointError, match="belongs to a run with other settings"):
        train(settings)


def test_a_resumed_run_records_no_step_twice(run_settings):
    train(replace(run_settings, steps=3, stop_after=0.0))
    file = run_settings.out / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n{"step": 3, "lo')  # a kill
    settings = replace(run_settings, steps=3)
    train(settings)
    assert [row["step"] for row in metrics(settings)] == [1, 3]


def test_a_damaged_state_is_refused(run_settings):
    settings = replace(run_settings, steps=2)
    train(settings)
    state = settings.out / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state\.safetensors: cannot be read"):
        train(settings)


def test_a_tokenizer_larger_than_the_model_is_refused(run_settings, write_config):
    train(replace(run_settings, steps=1))
    tokenizer = run_settings.out / "tokenizer.json"
    small = replace(run_settings, tokenizer=tokenizer, out=run_settings.out / "small")
    write_config(vocab_size=300)
    with pytest.raises(DataError, match="has 319 tokens, more than the vocab_size of 300"):
        train(small)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attention_bias": True}, "attention_bias must be false"),
        ({"rope_interleave": False}, "rope_interleave must be true"),
        ({"bos_token_id": 5}, "bos_token_id must be 0"),
        ({"eos_token_id": [1, 2]}, "eos_token_id must be 1"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"max_position_embeddings": 16}, "--window is 32; the model's max_position_embeddings allows 16"),
    ],
)
def test_a_model_that_would_be_served_otherwise_is_not_trained(run_settings, write_config, changes, sentence):
    write_config(**changes)
    with pytest.raises(InputError, match=sentence):
        train(run_settings)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 16, "tie_word_embeddings": False},
        {"n_shared_experts": 2, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3},
        {"first_k_dense_replace": 0, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
        {"q_lora_rank": 16, "rms_norm_eps": 1e-2},
    ],
)
def test_the_trained_model_is_the_one_transformers_loads(run_settings, write_config, changes):
    write_config(**changes)
    settings = replace(run_settings, steps=3)
    train(settings)
    reference = AutoModelForCausalLM.from_pretrained(settings.out, dtype=torch.float32).eval()
    ours = TrainingModel(read_model_config(settings.config), dropout=0.0).eval()
    load_checkpoint_tensors(ours, load_file(settings.out / "model.safetensors"))
    ids = torch.randint(2, 320, (2, 40))
    with torch.inference_mode():
        logits = reference(ids[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert ours(ids[:, :-1], ids[:, 1:]) == pytest.approx(expected.item(), abs=1e-5)


def test_transformers_reads_the_tokenizer(run_settings):
    train(replace(run_settings, steps=1))
    tokenizer = AutoTokenizer.from_pretrained(run_settings.out)
    ids = tokenizer("the page of memory")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids[1:]) == "the page of memory"


def test_a_run_can_start_from_the_weights_of_another(run_settings, tmp_path):
    train(replace(run_settings, steps=2))
    next_run = replace(
        run_settings, steps=1, learning_rate=1e-12, start_from=run_settings.out, out=tmp_path / "next", seed=9
    )
    train(next_run)
    before, after = (load_file(run.out / "model.safetensors") for run in (run_settings, next_run))
    assert all(torch.equal(before[name], after[name]) for name in before if "bias" not in name)


@pytest.mark.parametrize("wrong", ["start_from", "tokenizer"])
def test_files_to_start_with_that_are_none_are_named(run_settings, tmp_path, wrong):
    (tmp_path / "tokenizer.json").write_text("{}")
    given = {"start_from": tmp_path, "tokenizer": tmp_path / "tokenizer.json"}
    with pytest.raises(InputError, match=rf"{tmp_path}/tokenizer\.json is not a tokenizer"):
        train(replace(run_settings, **{wrong: given[wrong]}))


def test_weights_to_start_from_that_are_missing_are_named(run_settings, tmp_path):
    train(replace(run_settings, steps=1))
    (run_settings.out / "model.safetensors").unlink()
    again = replace(run_settings, steps=1, start_from=run_settings.out, out=tmp_path / "next")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        train(again)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_told(run_settings):
    with pytest.raises(InputError, match="device cuda is not available"):
        train(replace(run_settings, device="cuda"))


def test_starting_from_another_shape_is_refused(run_settings, write_config, tmp_path):
    train(replace(run_settings, steps=1))
    write_config(hidden_size=64)
    with pytest.raises(CheckpointError, match=r"has shape \(320, 48\), where --config asks for \(320, 64\)"):
        train(replace(run_settings, start_from=run_settings.out, out=tmp_path / "next"))


def test_export_and_import_are_inverse(write_config):
    config = read_model_config(write_config(tie_word_embeddings=False))
    first, second = TrainingModel(config, 0.0), TrainingModel(config, 0.0)
    load_checkpoint_tensors(second, named_tensors(untied_state(first), config.moe.routed))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_the_bias_method_evens_out_a_lopsided_router(write_config):
    config = read_model_config(write_config(n_group=1, topk_group=1))
    torch.manual_seed(0)
    model = TrainingModel(config, 0.0).train()
    mixture = next(m for m in model.modules() if isinstance(m, MixtureOfExperts))
    with torch.no_grad():
        mixture.router_ED[0] += 0.5  # expert 0 answers to everything positive
    x_BTD = torch.randn(1, 512, 48).abs()

    def busiest():
        mixture.load_E.zero_()
        mixture(x_BTD)
        return model.imbalance()

    before = busiest()
    for _ in range(400):
        busiest()
        model.balance(2e-3)
    assert before > 3
    assert busiest() < 1.3
