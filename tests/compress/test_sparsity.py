"""Masks and their schedule, and that they train: properties for any weights, and one real problem."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_worker.compress.sparsity import PATTERNS, S14, S24, Schedule, Sparsifier, mask_keeping
from moe_worker.compress.sparsity.schedule import SparsityPhase
from moe_worker.errors import SettingsError

QUICK = settings(max_examples=60, deadline=None)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 12).map(lambda quads: 4 * quads))


def random(shape, seed, ties=False):
    weights = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (weights * 2).round() if ties else weights


@QUICK
@given(shape=shapes, seed=st.integers(0, 999), pattern=st.sampled_from([S14, S24]), ties=st.booleans())
def test_every_quad_keeps_its_largest(shape, seed, pattern, ties):
    scores = random(shape, seed, ties).abs()
    mask = mask_keeping(scores, pattern.kept)
    quads, kept = scores.unflatten(-1, (-1, 4)), mask.unflatten(-1, (-1, 4))
    assert (kept.sum(-1) == pattern.kept).all()
    smallest_kept = quads.masked_fill(~kept, float("inf")).amin(-1)
    largest_gone = quads.masked_fill(kept, float("-inf")).amax(-1)
    assert (smallest_kept >= largest_gone).all()


@QUICK
@given(shape=shapes, seed=st.integers(0, 999), kept=st.floats(0, 4), ties=st.booleans())
def test_between_patterns_quads_differ_by_one_at_most_and_the_average_is_met(shape, seed, kept, ties):
    mask = mask_keeping(random(shape, seed, ties).abs(), kept).unflatten(-1, (-1, 4)).sum(-1)
    assert mask.min() >= int(kept)
    assert mask.max() <= int(kept) + 1
    assert abs(int(mask.sum()) - kept * mask.numel()) <= 0.5 + 1e-6 * mask.numel()


@QUICK
@given(shape=shapes, seed=st.integers(0, 999), more=st.floats(0, 4), less=st.floats(0, 4))
def test_a_tighter_mask_lies_within_a_looser_one(shape, seed, more, less):
    scores = random(shape, seed).abs()
    assert not (mask_keeping(scores, min(more, less)) & ~mask_keeping(scores, max(more, less))).any()


@pytest.mark.parametrize(
    ("inputs", "kept", "sentence"),
    [
        (7, 1, "sparsity: input dimension 7 is not divisible by 4"),
        (8, 5, "sparsity: kept is 5; it must be between 0 and 4"),
    ],
)
def test_a_mask_that_cannot_be_is_refused_with_its_reason(inputs, kept, sentence):
    with pytest.raises(ValueError, match=sentence):
        mask_keeping(torch.ones(2, inputs), kept)


def test_inputs_that_do_not_fall_into_fours_are_refused_by_name():
    with pytest.raises(
        SettingsError, match=r"layers\.0\.down has 6 inputs; sparsity of 1 in 4 needs a multi"
    ):
        Sparsifier({"layers.0.down": torch.ones(3, 6)}, Schedule(10, 1))


@QUICK
@given(
    steps=st.integers(1, 400),
    kept=st.sampled_from([1, 2]),
    dense=st.floats(0, 0.5),
    shrink=st.floats(0, 0.5),
)
def test_the_schedule_never_loosens_and_ends_at_the_pattern(steps, kept, dense, shrink):
    schedule = Schedule(steps, kept, dense, shrink)
    phases = [schedule.phase(step) for step in range(steps + 1)]
    assert phases == sorted(phases, key=list(SparsityPhase).index)
    amounts = [schedule.kept_at(step) for step in range(steps + 1)]
    assert amounts == sorted(amounts, reverse=True)
    assert all(
        amount == 4 for amount, phase in zip(amounts, phases, strict=True) if phase is SparsityPhase.DENSE
    )
    assert amounts[-1] == kept


def test_the_default_schedule_is_20_60_20():
    schedule = Schedule(1000, 1)
    assert (schedule.first_sparse, schedule.first_fixed) == (200, 800)


def trained(pattern, saliency, shares, steps=300):
    """A regression whose true weights are 1:4 at places that no first guess knows; its last loss."""
    generator = torch.Generator().manual_seed(3)
    truth = torch.zeros(8, 64)
    places = torch.randint(0, 4, (8, 16, 1), generator=generator)
    truth.unflatten(1, (16, 4)).scatter_(2, places, torch.randn(8, 16, 1, generator=generator).sign())
    weight = torch.nn.Parameter(torch.randn(8, 64, generator=generator))
    sparsifier = Sparsifier({"w": weight}, Schedule(steps, PATTERNS[pattern].kept, *shares), saliency)
    optimizer = torch.optim.Adam([weight], lr=0.03)
    for step in range(steps):
        sparsifier.update(step, {"w": weight})
        x = torch.randn(64, 64, generator=generator)
        effective = sparsifier.apply_masks(step, {"w": weight})["w"]
        loss = (x @ (effective - truth).T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if sparsifier.needs_gradients(step):
            sparsifier.observe({"w": weight}, {"w": weight.grad})
        optimizer.step()
    final = sparsifier.apply_masks(steps, {"w": weight})["w"]
    final = final.detach()
    return final, float((final - truth).square().mean() / truth.square().mean())


@pytest.mark.parametrize("saliency", ["magnitude", "gradient"])
def test_a_progressive_mask_finds_weights_that_a_mask_chosen_at_once_misses(saliency):
    final, progressive = trained("s14", saliency, (0.2, 0.6))
    assert ((final != 0).unflatten(1, (-1, 4)).sum(-1) <= 1).all()
    _, at_once = trained("s14", saliency, (0.0, 0.0))
    assert progressive < 0.05
    assert at_once > 0.5


def test_masked_weights_come_back_while_masks_tighten_and_not_afterwards():
    weight = torch.tensor([[3.0, 2.0, 1.0, 0.5]], requires_grad=True)
    sparsifier = Sparsifier({"w": weight}, Schedule(10, 1, 0.0, 0.8), update_every=1)
    for step, alive in ((7, 4), (9, 1)):
        sparsifier.update(min(step, 8), {"w": weight})
        weight.grad = None
        sparsifier.apply_masks(step, {"w": weight})["w"].sum().backward()
        assert int((weight.grad != 0).sum()) == alive
    with torch.no_grad():
        weight[0, 3] = 9.0
    sparsifier.update(7, {"w": weight})
    assert sparsifier.masks["w"][0, 3]


def test_masks_and_saliency_go_through_a_state_dict():
    weight = torch.randn(4, 16)
    first = Sparsifier({"a.b": weight}, Schedule(10, 1, 0, 0), "gradient")
    first.observe({"a.b": weight}, {"a.b": torch.randn(4, 16)})
    first.update(0, {"a.b": weight})
    second = Sparsifier({"a.b": weight}, Schedule(10, 1, 0, 0), "gradient")
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.masks["a.b"], second.masks["a.b"])
    assert not first.masks["a.b"].all()
