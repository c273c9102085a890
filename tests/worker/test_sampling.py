"""Choosing tokens: distributions, penalties, seeds, failures, and independence of the batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moe_worker.kernels.draw import BLOCK, Truncation, exponentials, mass_threshold, masses
from moe_worker.kernels.randomness import exponential, mix, signed
from moe_worker.sampling import batch as batches
from moe_worker.sampling.adjust import TokenCounts
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.sampling.sampler import Sampler
from tests.worker.sampling_cases import CPU, counted, probabilities, sampled, tokens_of

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
SEEDS = st.integers(0, 2**64 - 1)
# Distinct values, well apart: which of two equal ones goes is chance in transformers.
VOCABULARY = 40
SPREAD = st.permutations(range(VOCABULARY)).map(lambda order: torch.tensor(order) * 0.17 - 3.1)


def kept(logits, parameters):
    """The distribution (float64 [V]) that is drawn from."""
    keep = batches.truncation([parameters], len(logits), CPU)
    scores_1V = logits.unsqueeze(0)
    masses_1C = masses(
        scores_1V, scores_1V.amax(1, keepdim=True), torch.tensor([[parameters.temperature]]), keep
    )
    assert masses_1C[0, len(logits) :].sum() == 0
    distribution = masses_1C[0, : len(logits)].double()
    return distribution / distribution.sum()


def plain_draw(distribution, seed, index):
    """The token that the noise of (seed, index) chooses, in plain Python: a block, then a place in it."""
    blocks = list(torch.tensor(distribution).double().split(BLOCK))
    sums = [float(block.sum()) for block in blocks]
    block = max(range(len(sums)), key=lambda n: sums[n] / exponential(seed, index, BLOCK + n))
    inside = blocks[block].tolist()
    return block * BLOCK + max(range(len(inside)), key=lambda i: inside[i] / exponential(seed, index, i))


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
    """Off by rounding at the edge of the nucleus: there they may differ in one token."""
    ours, theirs = kept(logits, parameters), probabilities(logits, parameters)
    if (ours - theirs).abs().max() <= 1e-6:
        return
    nearby = [parameters.top_p * factor for factor in (1 - 1e-5, 1 + 1e-5)]
    edges = [
        probabilities(logits, SamplingParameters(**vars(parameters) | {"top_p": min(p, 1.0)})) for p in nearby
    ]
    assert min((ours - edge).abs().max() for edge in edges) <= 1e-6


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


def test_refused_and_very_unlikely_tokens_have_no_mass():
    scores_SV = torch.tensor([[0.0, -1.0, -27.0, -29.0, -63.9, -64.1, -1e30, -torch.inf]])
    masses_SC = masses(scores_SV, torch.zeros(1, 1), torch.ones(1, 1), Truncation())
    exact = [math.floor(math.exp(score) * 2**40) for score in scores_SV[0].tolist()]
    assert masses_SC[0, :8].tolist() == pytest.approx(exact, rel=1e-6)
    assert exact[2:4] == [2, 0]


def test_equals_at_the_edge_stay_together():
    flat = torch.zeros(8)
    for fields in ({"top_k": 3}, {"top_p": 0.3}, {"top_k": 3, "top_p": 0.3}, {"min_p": 1.0}):
        assert min(counted(flat, 800, temperature=1.0, **fields)) > 0


NOISE = st.tuples(SEEDS, st.integers(0, 2**31))


@given(st.lists(NOISE, min_size=1, max_size=8), st.integers(1, 600))
def test_the_device_makes_the_same_noise(pairs, count):
    states_S1 = torch.tensor([[signed(mix(seed))] for seed, _ in pairs])
    indices_S1 = torch.tensor([[index] for _, index in pairs])
    found_SL = exponentials(states_S1, indices_S1, count)
    for row_L, (seed, index) in zip(found_SL.tolist(), pairs, strict=True):
        expected = [exponential(seed, index, lane) for lane in range(count)]
        assert row_L == pytest.approx(expected, rel=1e-15)
        assert min(expected) > 0


def test_noise_is_exponential_and_independent_over_seeds_indices_and_lanes():
    seeds, indices, lanes = range(20), range(20), range(20)
    noise = torch.tensor([[[exponential(s, i, n) for n in lanes] for i in indices] for s in seeds])
    assert stats.kstest(noise.flatten(), "expon").pvalue > 1e-3
    for axis in range(3):
        first, second = noise.select(axis, 0).flatten(), noise.select(axis, 1).flatten()
        assert abs(stats.pearsonr(first, second).statistic) < 0.2


def test_both_stages_of_a_draw_follow_the_softmax():
    """1,000 tokens are four blocks: frequencies of the blocks, and of the tokens in each."""
    torch.manual_seed(5)
    logits, count = torch.randn(1000) * 2, 60_000
    counts = torch.tensor(counted(logits, count, temperature=1.0))
    expected = logits.double().softmax(0) * count
    often = expected >= 5
    pooled = torch.cat((counts[often], counts[~often].sum().view(1)))
    wanted = torch.cat((expected[often], expected[~often].sum().view(1)))
    assert stats.chisquare(pooled, wanted).pvalue > 1e-3
    blocks, block_wanted = (torch.stack([b.sum() for b in x.split(BLOCK)]) for x in (counts, expected))
    assert stats.chisquare(blocks, block_wanted).pvalue > 1e-3


@pytest.mark.parametrize(("fields", "draws"), [({}, 2000), ({"top_k": 50, "top_p": 0.9}, 400)], ids=str)
def test_noise_in_the_logits_changes_next_to_no_token(fields, draws):
    """At vocabulary 100,000, where half the tokens become likelier: inverting a sum changed every eighth."""
    torch.manual_seed(6)
    noise_V = torch.full((100_000,), 5e-6)
    noise_V[50_000:] *= -1
    logits_1V, given = torch.randn(1, 100_000), [SamplingParameters(temperature=1.0, **fields)] * 50
    changed = 0
    for first in range(0, draws, 50):
        logits_SV, seeds = logits_1V.expand(50, -1), list(range(first, first + 50))
        before, after = (tokens_of(each, given, seeds=seeds) for each in (logits_SV, logits_SV + noise_V))
        changed += sum(x != y for x, y in zip(before, after, strict=True))
    assert changed <= 1


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
    assert found == [plain_draw([1.0] * 10_000, 77, index) for index in range(5, 105)]


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
