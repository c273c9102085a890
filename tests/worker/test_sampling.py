"""Choosing tokens: distributions, penalties, seeds, failures, and independence of the batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moe_worker.sampling import batch as batches
from moe_worker.sampling.adjust import TokenCounts
from moe_worker.sampling.draw import draw, mass_threshold, uniforms
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.sampling.randomness import mix, signed, uniform
from moe_worker.sampling.sampler import Sampler
from tests.worker.sampling_cases import CPU, counted, probabilities, sampled, tokens_of

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
SEEDS = st.integers(0, 2**64 - 1)
# Distinct values, well apart: which of two equal ones goes is chance in transformers.
VOCABULARY = 40
SPREAD = st.permutations(range(VOCABULARY)).map(lambda order: torch.tensor(order) * 0.17 - 3.1)


def kept(logits, parameters, points=4096):
    """The distribution (float64 [V]) that is drawn from, to 1/`points`: by drawing at even distances."""
    keep = batches.truncation([parameters] * points, len(logits), CPU)
    scores_SV = logits.expand(points, -1)
    heats_S1 = torch.full((points, 1), parameters.temperature)
    even_S = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    tokens_S = draw(scores_SV, scores_SV.amax(1, keepdim=True), heats_S1, keep, even_S)
    return tokens_S.bincount(minlength=len(logits)).double() / points


def test_temperature_zero_takes_the_likeliest():
    assert counted(LOGITS, 3) == [3, 0, 0, 0, 0, 0]


def test_of_equal_logits_the_first_is_taken():
    assert tokens_of(torch.tensor([[0.0, 3.0, 3.0, 1.0]]), [SamplingParameters()]) == [1]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.5},
        {"temperature": 1.0},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 2},
        {"temperature": 1.5, "top_p": 0.85},
        {"temperature": 0.7, "min_p": 0.1},
        {"temperature": 2.0, "top_k": 4, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 5, "top_p": 0.95, "min_p": 0.2},
        {"temperature": 1.0, "logit_bias": ((0, -1.5), (5, 4.0))},
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution_of_transformers(fields):
    counts = torch.tensor(counted(LOGITS, **fields))
    expected = probabilities(LOGITS, SamplingParameters(**fields)) * counts.sum()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert possible.sum() > 1
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3


def test_frequencies_over_the_tokens_of_one_request_follow_the_softmax():
    sampler = Sampler(6, CPU, ())
    sampler.admit(0, SamplingParameters(temperature=1.0), 1234, ())
    tokens = torch.cat([sampler.sample(LOGITS.unsqueeze(0), [0]).tokens_B for _ in range(4000)])
    expected = LOGITS.double().softmax(0) * 4000
    assert stats.chisquare(tokens.bincount(minlength=6), expected).pvalue > 1e-3


@settings(deadline=None)
@given(
    SPREAD,
    st.builds(
        SamplingParameters,
        temperature=st.floats(0.2, 2),
        top_k=st.integers(0, VOCABULARY + 5),
        top_p=st.floats(0.05, 1),
        min_p=st.just(0.0) | st.floats(0.001, 0.9),
    ),
)
def test_what_is_kept_is_what_the_warpers_of_transformers_keep(logits, parameters):
    """Off by the points, and by rounding at the edge of the nucleus: there they may differ in one token."""
    ours, theirs = kept(logits, parameters), probabilities(logits, parameters)
    if (ours - theirs).abs().max() <= 2 / 4096:
        return
    nearby = [parameters.top_p * factor for factor in (1 - 1e-5, 1 + 1e-5)]
    edges = [
        probabilities(logits, SamplingParameters(**vars(parameters) | {"top_p": min(p, 1.0)})) for p in nearby
    ]
    assert min((ours - edge).abs().max() for edge in edges) <= 2 / 4096


@settings(deadline=None)
@given(SPREAD, st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8), st.floats(0.1, 10))
def test_a_repetition_penalty_does_what_that_of_transformers_does(logits, prompt, penalty):
    parameters = SamplingParameters(repetition_penalty=penalty, temperature=1.0)
    changed_1V = adjusted(logits, parameters, prompt=prompt[:3], output=prompt[3:])
    torch.testing.assert_close(
        changed_1V[0].double().softmax(-1), probabilities(logits, parameters, prompt), atol=1e-6, rtol=1e-5
    )


def adjusted(logits, parameters, prompt=(), output=()):
    """The logits [1, V] from which a token is chosen."""
    counts = TokenCounts(len(logits), CPU)
    row = batches.Row(parameters, 0, len(output), frozenset(), counts.open(prompt, output))
    scores_1V = logits.unsqueeze(0).clone()
    batches.build([0], [row], counts, CPU).adjust(scores_1V)
    return scores_1V


def test_presence_and_frequency_penalties_count_the_text_and_not_the_prompt():
    parameters = SamplingParameters(presence_penalty=0.5, frequency_penalty=0.25)
    [changed_V] = adjusted(LOGITS, parameters, prompt=[0, 0, 1], output=[1, 2, 2, 2])
    expected_V = LOGITS - torch.tensor([0, 0.75, 1.25, 0, 0, 0])
    torch.testing.assert_close(changed_V, expected_V)


def test_penalties_count_what_is_chosen_step_by_step():
    """With these, each token is taken once before any is taken twice, in the order of their logits."""
    sampler = Sampler(6, CPU, ())
    sampler.admit(7, SamplingParameters(frequency_penalty=2.0), 0, [0])
    sampler.admit(8, SamplingParameters(), 0, [0])
    logits_BV = (LOGITS / 4).expand(2, -1)
    steps = [sampler.sample(logits_BV, [7, 8]).tokens_B.tolist() for _ in range(12)]
    assert [first for first, _ in steps] == [0, 1, 2, 3, 4, 5] * 2
    assert {second for _, second in steps} == {0}


def test_a_row_of_counts_is_empty_for_the_sequence_that_gets_it_next():
    sampler = Sampler(6, CPU, ())
    given = SamplingParameters(repetition_penalty=10.0)
    for name in range(20):
        sampler.admit(name, given, 0, [0])
        assert sampler.sample(LOGITS.unsqueeze(0), [name]).tokens_B.tolist() == [1]
        sampler.release(name)
    sampler.admit(99, given, 0, [1])
    assert sampler.sample(LOGITS.unsqueeze(0), [99]).tokens_B.tolist() == [0]
    assert sampler._counts.output_PV.shape[0] == 4, "rows are used again"


def test_a_sequence_admitted_again_starts_anew_and_holds_one_row_of_counts():
    sampler = Sampler(6, CPU, ())
    for _ in range(9):
        sampler.admit(0, SamplingParameters(frequency_penalty=2.0), 0, ())
        assert sampler.sample(LOGITS.unsqueeze(0) / 4, [0]).tokens_B.tolist() == [0]
    assert sampler._counts.output_PV.shape[0] == 4


def test_more_penalized_sequences_than_there_were_rows_keep_their_counts():
    sampler = Sampler(6, CPU, ())
    for name in range(11):
        sampler.admit(name, SamplingParameters(frequency_penalty=2.0), 0, (), [name % 6])
    tokens = sampler.sample((LOGITS / 4).expand(11, -1), range(11)).tokens_B.tolist()
    assert tokens == [1 if name % 6 == 0 else 0 for name in range(11)]


def test_a_bias_bans_and_forces():
    ban = SamplingParameters(logit_bias=((0, -100.0),))
    force = SamplingParameters(logit_bias=((5, 100.0),), temperature=2.0)
    assert tokens_of(LOGITS.expand(3, -1), [ban, force, SamplingParameters()]) == [1, 5, 0]


@pytest.mark.parametrize("ignore", [False, True])
def test_end_tokens_wait_for_min_tokens(ignore):
    given = SamplingParameters(min_tokens=3, stop_token_ids=(1,), ignore_eos=ignore)
    sampler = Sampler(6, CPU, [0])
    sampler.admit(0, given, 0, ())
    tokens = [sampler.sample(LOGITS.unsqueeze(0), [0]).tokens_B.item() for _ in range(5)]
    assert tokens == ([0] * 5 if ignore else [2, 2, 2, 0, 0])
    assert given.end_tokens([0]) == ({1} if ignore else {0, 1})


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-30, 1e-9])
def test_the_smallest_temperatures_are_greedy(temperature):
    assert counted(LOGITS, 10, temperature=temperature)[0] == 10


def test_a_huge_temperature_makes_all_alike():
    counts = counted(LOGITS * 1e4, 6000, temperature=1e30)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_huge_logits_stay_finite():
    logits = torch.tensor([3e38, -3e38, 2.9e38])
    assert counted(logits, 10, temperature=1.0) == [10, 0, 0]


def test_equals_at_the_edge_stay_together():
    flat = torch.zeros(8)
    for fields in ({"top_k": 3}, {"top_p": 0.3}, {"top_k": 3, "top_p": 0.3}, {"min_p": 1.0}):
        assert min(counted(flat, 800, temperature=1.0, **fields)) > 0


@given(SEEDS, st.integers(0, 2**20))
def test_uniform_is_below_one(seed, index):
    assert 0 <= uniform(seed, index) < 1


@given(st.lists(st.tuples(SEEDS, st.integers(0, 2**31)), min_size=1, max_size=20))
def test_the_device_draws_the_same_numbers(pairs):
    states_S = torch.tensor([signed(mix(seed)) for seed, _ in pairs])
    indices_S = torch.tensor([index for _, index in pairs])
    assert uniforms(states_S, indices_S).tolist() == [uniform(seed, index) for seed, index in pairs]


def test_uniform_is_uniform_and_seeds_are_independent():
    values = [uniform(seed, index) for seed in range(50) for index in range(50)]
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    first, second = ([uniform(seed, index) for index in range(2000)] for seed in (1, 2))
    assert abs(stats.pearsonr(first, second).statistic) < 0.1


ANY = st.builds(
    SamplingParameters,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 7, 1500]),
    top_p=st.sampled_from([0.1, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logit_bias=st.sampled_from([(), ((3, 2.0), (1999, -5.0))]),
    min_tokens=st.sampled_from([0, 2]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(ANY, SEEDS), min_size=2, max_size=7), st.data())
def test_tokens_do_not_depend_on_the_batch_nor_on_preemption(sequences, data):
    """Bf16 logits, in which equals are common; a row apart, among others, and admitted anew half-way."""
    torch.manual_seed(0)
    steps, vocab = 4, 2001
    logits_KBV = (torch.randn(steps, len(sequences), vocab) * 3).bfloat16()
    together = Sampler(vocab, CPU, [5])
    for name, (parameters, seed) in enumerate(sequences):
        together.admit(name, parameters, seed, [1, 2])
    order = data.draw(st.permutations(range(len(sequences))))
    found = {name: [] for name in order}
    for logits_BV in logits_KBV:
        tokens = together.sample(logits_BV[order], order).tokens_B.tolist()
        for name, token in zip(order, tokens, strict=True):
            found[name].append(token)
    for name, (parameters, seed) in enumerate(sequences):
        apart = Sampler(vocab, CPU, [5])
        output = []
        for step in range(steps):
            if step in (0, 2):
                apart.release(name)
                apart.admit(name, parameters, seed, [1, 2], output)
            output += apart.sample(logits_KBV[step, name : name + 1], [name]).tokens_B.tolist()
        assert found[name] == output


def test_numbers_go_on_where_they_were_over_many_steps_and_changes_of_the_batch():
    logits_BV = torch.zeros(2, 10_000)
    given = SamplingParameters(temperature=1.0)
    sampler = Sampler(10_000, CPU, ())
    sampler.admit(0, given, 77, (), [0] * 5)
    found = []
    for step in range(100):
        if step == 45:
            sampler.admit(1, given, 78, ())
        names = [0] if step < 45 else [0, 1]
        found.append(sampler.sample(logits_BV[: len(names)], names).tokens_B[0].item())
    assert found == [int(uniform(77, index) * 10_000) for index in range(5, 105)]


def test_large_batches_are_drawn_in_parts_with_the_same_result(monkeypatch):
    logits_BV = torch.randn(9, 50)
    given = [SamplingParameters(temperature=row % 3, top_p=0.9) for row in range(9)]
    whole = tokens_of(logits_BV, given)
    monkeypatch.setattr(batches, "PART_LOGITS", 100)
    assert tokens_of(logits_BV, given) == whole


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.floats(0.001, 1))
def test_the_threshold_is_the_one_that_sorting_finds(levels, share):
    weights = torch.tensor([1.0, *(0.7**level for level in levels)])
    masses = (weights * 2.0**40).long()
    target = max(1, math.ceil(int(masses.sum()) * share))
    order = weights.argsort(descending=True)
    position = int((masses[order].cumsum(0) < target).sum())
    found = mass_threshold(weights.unsqueeze(0), masses.unsqueeze(0), torch.tensor([[target]]))
    assert found.item() == weights[order][position]


def test_a_row_that_cannot_be_chosen_from_is_flagged_and_harms_no_other():
    logits_BV = torch.randn(5, 30)
    given = [SamplingParameters(temperature=1.0, top_p=0.8, top_k=5, logprobs=2, frequency_penalty=1.0)] * 5
    clean = tokens_of(logits_BV, given)
    for temperature in (0.0, 1.0):
        rows = [SamplingParameters(**vars(given[0]) | {"temperature": temperature})] * 3 + given[3:]
        broken_BV = logits_BV.clone()
        broken_BV[0, 7] = math.nan
        broken_BV[1, 7] = math.inf
        broken_BV[2] = -math.inf
        result, _ = sampled(broken_BV, rows)
        assert result.failed_B.tolist() == [True, True, True, False, False]
        assert result.tokens_B.tolist()[3:] == clean[3:]
        assert all(0 <= token < 30 for token in result.tokens_B.tolist())


def test_logits_that_are_ruled_out_are_no_failure():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]] * 2)
    result, _ = sampled(logits, [SamplingParameters(), SamplingParameters(temperature=2.0, top_p=0.9)])
    assert (result.tokens_B.tolist(), result.failed_B.tolist()) == ([1, 1], [False, False])


def test_logprobs_are_those_of_the_model():
    """In bf16 with a penalty, a bias and a temperature, none of which they show."""
    logits_BV = torch.randn(4, 100).bfloat16()
    given = [
        SamplingParameters(temperature=2.0, logit_bias=((3, 9.0),), repetition_penalty=2.0, logprobs=5),
        SamplingParameters(),
        SamplingParameters(logprobs=0),
        SamplingParameters(logprobs=20),
    ]
    before = logits_BV.clone()
    result, _ = sampled(logits_BV, given, prompt=[1, 2])
    assert torch.equal(before, logits_BV)
    listed = result.logprobs.listed()
    expected_BV = logits_BV.double().log_softmax(-1)
    assert sorted(listed) == [0, 2, 3]
    for row, tokens in listed.items():
        chosen = result.tokens_B[row]
        assert tokens.logprob == pytest.approx(expected_BV[row, chosen].item(), abs=1e-5)
        values = expected_BV[row].topk(given[row].logprobs).values.tolist()
        assert [logprob for _, logprob in tokens.top] == pytest.approx(values, abs=1e-5)
        assert [expected_BV[row, token].item() for token, _ in tokens.top] == pytest.approx(values, abs=1e-5)
        assert len({token for token, _ in tokens.top}) == given[row].logprobs


def test_no_logprobs_are_computed_where_none_are_wanted():
    assert sampled(LOGITS.unsqueeze(0), [SamplingParameters()])[0].logprobs is None
