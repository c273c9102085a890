"""Losses and balance that make experts specialists, and the matrix that says which are whose."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_worker.config import read_model_config
from moe_worker.config.moe import Level
from moe_worker.errors import DataError, SettingsError
from moe_worker.moe.capability import CapabilityMatrix
from moe_worker.train.corpus import read_domains
from moe_worker.train.settings import TrainSettings
from moe_worker.train.specialise import bias_step, cost, cut_at, domain_loss, groups_of_domains
from moe_worker.train.trainer import TrainingRun, train


@pytest.fixture
def run_settings(tmp_path, write_config, text_file):
    return TrainSettings(
        data=text_file, config=write_config(), out=tmp_path / "run", steps=6, batch=4, window=32, warmup=2,
        device="cpu",
    )  # fmt: skip


LEVELS = {"levels": [{"groups": 2, "keep": 1, "best": 2}, {"groups": 4, "keep": 2}], "mass": 0.7}


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=9),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([1, 2]),
)
def test_domains_share_the_groups(sizes, groups, keep):
    found = groups_of_domains(sizes, groups, keep)
    assert all(len(set(own)) == len(own) >= keep for own in found)
    assert {group for own in found for group in own} <= set(range(groups))
    if len(sizes) * keep <= groups:
        assert sorted(group for own in found for group in own) == list(range(groups))
    else:
        loads = [
            sum(n for n, own in zip(sizes, found, strict=True) if group in own) for group in range(groups)
        ]
        assert max(loads) - min(loads) <= max(sizes)


def test_a_domain_has_groups_for_all_experts_of_a_token(run_settings, write_config, tmp_path):
    levels = [{"groups": 4, "keep": 2}]
    config, labels = (
        write_config(n_group=1, topk_group=1, routing={"levels": levels}),
        tmp_path / "labels.txt",
    )
    settings = dataclasses.replace(run_settings, config=config, domains=labels, domain_share=0.1)
    documents = int((TrainingRun(run_settings).corpus.stream_N == 0).sum())
    labels.write_text("\n".join("abc"[number % 3] for number in range(documents)))
    led_NG, _ = TrainingRun(settings).learner._hint
    assert led_NG.sum(dim=1).tolist() == [2, 2, 2]


def test_the_hint_rewards_the_domains_own_groups():
    scores = torch.full((1, 3, 8), 0.1, requires_grad=True)
    led, domains = torch.tensor([[True, False], [False, True]]), torch.tensor([[0, 1, -1]])
    loss = domain_loss(scores, led, domains)
    assert loss.item() == pytest.approx(np.log(2), rel=1e-4)
    loss.backward()
    assert (scores.grad[0, 0, :4] < 0).all()
    assert (scores.grad[0, 0, 4:] > 0).all()
    assert (scores.grad[0, 2] == 0).all()


def test_few_sharp_experts_cost_less_than_many_even_ones():
    even, sharp = torch.ones(1, 1, 8), torch.tensor([[[1.0, 0.1, 0.1, 0.1, 0, 0, 0, 0]]])
    assert float(cost(even, 4)) == pytest.approx(1)
    assert float(cost(sharp, 4)) < 0.8
    assert float(cost(even, 1)) == 0


@given(st.integers(1, 1000), st.floats(0, 1))
def test_the_cut_begins_late_and_is_whole_in_the_end(steps, after):
    shares = [cut_at(step, steps, after) for step in range(steps)]
    assert shares == sorted(shares)
    assert all(share == 0 for step, share in enumerate(shares) if after > 0 and step <= after * steps)
    assert all(share == 1 for step, share in enumerate(shares) if step >= (1 + after) / 2 * steps + 1)


def test_experts_are_cut_after_a_share_of_the_steps(run_settings, write_config):
    """A step of a run with all experts, then one with half of the cut, then all of it."""
    config = write_config(n_group=1, topk_group=1, routing={"mass": 0.5})
    settings = dataclasses.replace(run_settings, config=config, steps=9, mass_after=0.4, expert_cost=0.1)
    run, found = TrainingRun(settings), []
    (mixture,) = run.learner.model.mixtures
    x = torch.randn(4, 64, 48)
    for step in range(settings.steps):
        run.learner.step(step, run.sampler, None, measure=False)
        found.append((float(mixture.cut), int((mixture.route(x)[0] >= 0).sum())))
    assert [share for share, _ in found] == pytest.approx(
        [0, 0, 0, 0, *(2 * n / 5.4 for n in (0.4, 1.4, 2.4)), 1, 1]
    )
    assert found[0][1] == x[..., 0].numel() * mixture.config.moe.top_k
    assert found[0][1] >= found[5][1] > found[8][1]
    assert mixture.router_loss > 0


@pytest.mark.parametrize("flag", ["expert_cost", "mass_after"])
def test_what_lowers_the_mass_needs_one_below_1(run_settings, write_config, flag):
    settings = dataclasses.replace(run_settings, config=write_config(routing={"mass": 1.0}), **{flag: 0.1})
    sentence = rf"--{flag.replace('_', '-')} is 0\.1, but .*config.json has no routing\.mass below 1"
    with pytest.raises(SettingsError, match=sentence):
        TrainingRun(settings)


def test_balance_moves_experts_and_the_groups_of_each_level():
    load = torch.tensor([4.0, 2.0, 1.0, 1.0])
    assert bias_step(load, ()).tolist() == [-1, 0, 1, 1]
    assert bias_step(load, (Level(2, 1),)).tolist() == [-2, -1, 2, 2]


def test_labels_stand_for_the_tokens_of_their_documents(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("git\npython\ngit\n")
    stream = np.array([0, 7, 8, 1, 0, 9, 1, 0, 5, 1], np.int32)
    found = read_domains(path, stream)
    assert found.names == ("git", "python")
    assert found.tokens_N.tolist() == [0] * 4 + [1] * 3 + [0] * 3
    path.write_text("git\n")
    with pytest.raises(DataError, match="has 1 labels for 3 documents; give one a line"):
        read_domains(path, stream)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [("domains", b"git", "has 1 labels for"), ("valid", b"\xff", "byte 0 is not UTF-8")],
)
def test_texts_that_do_not_fit_are_refused_before_a_tokenizer_is_trained(
    run_settings, tmp_path, name, content, sentence
):
    path = tmp_path / "wrong.txt"
    path.write_bytes(content)
    settings = dataclasses.replace(run_settings, out=tmp_path / "out", **{name: path})
    with pytest.raises(DataError, match=sentence):
        TrainingRun(settings)
    assert list(settings.out.iterdir()) == []


def test_a_model_of_levels_learns_its_domains(run_settings, write_config, tmp_path):
    config = write_config(n_group=1, topk_group=1, routing=LEVELS)
    plain = TrainingRun(dataclasses.replace(run_settings, config=config))
    documents = int((plain.corpus.stream_N == 0).sum())
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("ab"[number % 2] for number in range(documents)))
    settings = dataclasses.replace(
        run_settings, config=config, out=tmp_path / "led", domains=labels, domain_share=0.1, expert_cost=0.1
    )
    run = TrainingRun(settings)
    run.run()
    (mixture,) = run.learner.model.mixtures
    x = torch.randn(2, 20, 48)
    chosen, weights, _ = mixture.route(x)
    assert torch.equal(chosen < 0, weights == 0)
    assert ((chosen // 4).amax(-1) == torch.where(chosen < 0, 9, chosen // 4).amin(-1)).all()  # one group
    assert read_model_config(settings.out / "config.json").moe.routing.levels == (Level(2, 1, 2), Level(4, 2))


def test_the_coefficient_balances_too(run_settings, write_config):
    config = write_config(n_group=1, topk_group=1)
    run = TrainingRun(
        dataclasses.replace(run_settings, config=config, balance="coefficient", balance_strength=0.5)
    )
    run.run()
    (mixture,) = run.learner.model.mixtures
    assert mixture.bias_E.abs().max() > 0
    assert mixture.bias_E.max() - mixture.bias_E.min() <= 0.5


def test_a_hint_without_labels_is_refused(run_settings):
    with pytest.raises(SettingsError, match=r"domain_share is 0.5, but there are no labels"):
        train(dataclasses.replace(run_settings, domain_share=0.5))


def test_the_matrix_learns_who_is_whose_and_forgets():
    matrix = CapabilityMatrix(layers=1, domains=2, experts=4, named=2, half_life=10)
    first, second = torch.tensor([[5, 5, 0, 0]]), torch.tensor([[0, 0, 5, 5]])
    assert matrix.fit() is None
    for _ in range(3):
        matrix.observe(0, first, 10)
        matrix.observe(1, second, 10)
    assert matrix.fit() == 1
    assert matrix.named()[0].sort().values.tolist() == [[0, 1], [2, 3]]
    assert [matrix.infer(first), matrix.infer(second)] == [0, 1]
    assert torch.allclose(matrix.affinity().sum(-1), torch.ones(1, 2, dtype=torch.float64))
    for _ in range(4):
        matrix.observe(0, second, 10)
    assert matrix.named()[0, 0].sort().values.tolist() == [2, 3]
    assert matrix.fit() < 1
