"""Routing in levels and by mass: what every backend's router must do, and what a configuration may say."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_worker.config import parse_model_config
from moe_worker.config.moe import Level, Routing
from moe_worker.errors import ConfigError
from moe_worker.kernels.cpu import operations
from moe_worker.kernels.cpu.build import BuildError
from moe_worker.kernels.cpu.library import Kernels
from moe_worker.moe.router import choose, scores
from tests.checkpoints import FAMILIES

CASES = settings(max_examples=40, deadline=None)
TOKENS, WIDTH = 7, 48


def native():
    """None where there is no C++ compiler."""
    try:
        return Kernels(threads=1)
    except BuildError:
        return None


KERNELS = native()


def torch_route(x, weight, bias, routing):
    return choose(scores(x @ weight.T, routing), bias, routing)


def native_route(x, weight, bias, routing):
    chosen, weights = operations.route(KERNELS, x, weight, bias, routing)
    return chosen[:, : routing.top_k].long(), weights[:, : routing.top_k]


ROUTERS = pytest.mark.parametrize("route", [torch_route, native_route] if KERNELS else [torch_route])
MASS = st.floats(0.01, 1)
SEED = st.integers(0, 1 << 20)


@st.composite
def routings(draw):
    """Any that a configuration may describe."""
    levels, groups, reachable = [], 1, 1
    for factor in draw(st.lists(st.integers(2, 3), max_size=3)):
        groups, reachable = groups * factor, reachable * factor
        keep = draw(st.integers(1, reachable))
        levels.append(Level(groups, keep, draw(st.integers(1, 2))))
        reachable = keep
    size = draw(st.integers(2, 4))
    top_k = draw(st.integers(1, min(12, reachable * size)))
    softmax, normalise = draw(st.booleans()), draw(st.booleans())
    mass = draw(st.sampled_from([1.0, 0.9, 0.6, 0.3, 0.01]))
    return Routing(groups * size, 1, top_k, tuple(levels), softmax, normalise, 1.5, mass)


def drawn(routing, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((TOKENS, WIDTH), (routing.experts, WIDTH), (routing.experts,))
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in shapes)
    return x, weight / WIDTH**0.5, bias / 10


def by_hand(logits, bias, routing):
    """{expert: weight} of one token, in plain Python."""
    powers = logits.double().softmax(0) if routing.softmax else logits.double().sigmoid()
    score = powers.tolist()
    choice = {expert: score[expert] + float(bias[expert]) for expert in range(routing.experts)}
    for level in routing.levels:
        size = routing.experts // level.groups
        members = {}
        for expert, value in choice.items():
            members.setdefault(expert // size, []).append(value)
        best = {group: sum(sorted(found)[-level.best :]) for group, found in members.items()}
        kept = sorted(best, key=best.get)[-level.keep :]
        choice = {expert: value for expert, value in choice.items() if expert // size in kept}
    ranked = sorted(choice, key=choice.get, reverse=True)[: routing.top_k]
    total, taken, found = sum(score[expert] for expert in ranked), 0.0, []
    for expert in ranked:
        if found and taken >= routing.mass * total and routing.mass < 1:
            break
        found.append(expert)
        taken += score[expert]
    divisor = sum(score[expert] for expert in found) if routing.normalise else 1.0
    return {expert: score[expert] / divisor * routing.scale for expert in found}


@ROUTERS
@CASES
@given(routing=routings(), seed=SEED)
def test_a_router_chooses_what_the_description_says(route, routing, seed):
    x, weight, bias = drawn(routing, seed)
    chosen, weights = route(x, weight, bias, routing)
    for token in range(TOKENS):
        truth = by_hand(weight @ x[token], bias, routing)
        pairs = zip(chosen[token].tolist(), weights[token].tolist(), strict=True)
        found = {expert: share for expert, share in pairs if expert >= 0}
        assert found.keys() == truth.keys()
        assert found == pytest.approx(truth, rel=1e-3)
    assert torch.equal(weights == 0, chosen == -1)


@ROUTERS
@CASES
@given(routing=routings())
def test_no_tokens_get_no_experts(route, routing):
    """A rank of a mesh takes part in a pass without tokens of its own."""
    x, weight, bias = drawn(routing, 0)
    chosen, weights = route(x[:0], weight, bias, routing)
    assert chosen.shape == weights.shape == (0, routing.top_k)


@ROUTERS
@CASES
@given(routing=routings(), seed=SEED, masses=st.tuples(MASS, MASS))
def test_more_mass_never_takes_an_expert_away(route, routing, seed, masses):
    x, weight, bias = drawn(routing, seed)
    less, more = (
        route(x, weight, bias, dataclasses.replace(routing, mass=mass))[0] for mass in sorted(masses)
    )
    for few, many in zip(less.tolist(), more.tolist(), strict=True):
        assert len(set(few) - {-1}) >= 1
        assert set(few) - {-1} <= set(many) - {-1}


@ROUTERS
@CASES
@given(routing=routings(), seed=SEED)
def test_all_of_the_mass_is_a_fixed_number_of_experts(route, routing, seed):
    x, weight, bias = drawn(routing, seed)
    fixed = dataclasses.replace(routing, mass=1.0)
    chosen, weights = route(x, weight, bias, fixed)
    assert (chosen >= 0).all()
    near, near_weights = route(x, weight, bias, dataclasses.replace(routing, mass=1 - 1e-9))
    order, near_order = chosen.argsort(dim=1), near.argsort(dim=1)
    assert torch.equal(chosen.gather(1, order), near.gather(1, near_order))
    assert torch.allclose(weights.gather(1, order), near_weights.gather(1, near_order))


@ROUTERS
@CASES
@given(routing=routings(), seed=SEED)
def test_weights_add_up_and_reach_the_mass(route, routing, seed):
    x, weight, bias = drawn(routing, seed)
    chosen, weights = route(x, weight, bias, dataclasses.replace(routing, normalise=True))
    assert torch.allclose(weights.sum(1), torch.full((TOKENS,), routing.scale), rtol=1e-4)
    every = scores(x @ weight.T, routing)
    top, _ = choose(every, bias, dataclasses.replace(routing, mass=1.0))
    reached = every.gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0).sum(1)
    assert (reached >= routing.mass * every.gather(1, top).sum(1) * (1 - 1e-5)).all()


def config(**changes):
    fields = FAMILIES["deepseek_v3"] | {"model_type": "deepseek_v3", "n_group": 1, "topk_group": 1} | changes
    return parse_model_config(fields, "config.json")


def test_deepseeks_groups_are_one_level():
    """So a level has the parity with transformers that tests/worker/test_model.py shows for groups."""
    groups = config(n_group=4, topk_group=2).moe
    level = config(routing={"levels": [{"groups": 4, "keep": 2, "best": 2}]}).moe
    assert level == groups
    assert groups.routing.levels == (Level(4, 2, 2),)
    assert groups.routing.mass == 1


def test_levels_are_read_coarse_to_fine():
    levels = [{"groups": 2, "keep": 1, "best": 2}, {"groups": 4, "keep": 2}, {"groups": 8, "keep": 3}]
    routing = config(routing={"levels": levels, "mass": 0.8}).moe.routing
    assert routing.levels == (Level(2, 1, 2), Level(4, 2), Level(8, 3))
    assert routing.mass == 0.8
    assert routing.is_dynamic


@pytest.mark.parametrize(
    ("routing", "said"),
    [
        ([], 'routing is []; it must be an object, as {"levels": [...], "mass": 0.9}'),
        ({"mass": 1.5}, "routing: mass is 1.5; it must be a number above 0, at most 1"),
        ({"mass": 0}, "routing: mass is 0; it must be a finite number above 0"),
        ({"levels": []}, "levels is []; it must be a list of 1 to 4 objects with groups, keep and best"),
        ({"levels": [{"groups": 3, "keep": 1}]}, "groups is 3; it must be a divisor of the 8 routed experts"),
        ({"levels": [{"groups": 4, "keep": 5}]}, "keep is 5; it must be at most 4, the groups that"),
        ({"levels": [{"groups": 4}]}, "keep is missing; it must be an integer"),
        (
            {"levels": [{"groups": 8, "keep": 4, "best": 2}]},
            "best is 2; it must be at most 1, the experts",
        ),
        ({"levels": [{"groups": 4, "keep": 2, "best": 3}]}, "best is 3; it must be an integer from 1 to 2"),
        (
            {"levels": [{"groups": 4, "keep": 2}, {"groups": 2, "keep": 1}]},
            "routing.levels[1]: groups is 2; it must be a multiple of the 4 groups of the level before",
        ),
        (
            {"levels": [{"groups": 2, "keep": 1}, {"groups": 4, "keep": 3}]},
            "routing.levels[1]: keep is 3; it must be at most 2, the groups that the level before",
        ),
        (
            {"levels": [{"groups": 8, "keep": 1}]},
            "num_experts_per_tok is 2; it must be at most 1, the experts",
        ),
    ],
)
def test_routing_that_cannot_be_is_refused(routing, said):
    with pytest.raises(ConfigError) as error:
        config(routing=routing)
    assert said in str(error.value)


def test_levels_and_deepseeks_groups_exclude_each_other():
    with pytest.raises(ConfigError, match="left out where n_group is above 1"):
        config(n_group=4, topk_group=2, routing={"levels": [{"groups": 4, "keep": 2}]})
