"""Sampling on a GPU: the same distributions, the same random numbers, and no waiting for the device."""

import math

import pytest
import torch
from scipy import stats

from moe_worker.kernels.draw import exponentials, mass_threshold
from moe_worker.kernels.randomness import exponential, mix, signed
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.sampling.sampler import Sampler
from tests.worker.sampling_cases import counted, probabilities, sampled, tokens_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda")
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
VARIED = [
    SamplingParameters(),
    SamplingParameters(temperature=1.0),
    SamplingParameters(temperature=0.7, top_k=50, top_p=0.9),
    SamplingParameters(temperature=1.3, top_p=0.95, repetition_penalty=1.2),
    SamplingParameters(temperature=1.0, top_k=3000, min_p=0.02, logprobs=4),
    SamplingParameters(temperature=2.0, frequency_penalty=0.5, logit_bias=((4, 3.0),), min_tokens=2),
]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 1.5, "top_p": 0.85},
        {"temperature": 2.0, "top_k": 4, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 5, "top_p": 0.95, "min_p": 0.2},
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution_of_transformers(fields):
    counts = torch.tensor(counted(LOGITS, device=GPU, **fields))
    expected = probabilities(LOGITS, SamplingParameters(**fields)) * counts.sum()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3


def test_the_device_makes_the_same_noise():
    pairs = [(seed * 0x9E3779B97F4A7C15 % 2**64, index) for seed in range(40) for index in (0, 1, 2**31)]
    states_S1 = torch.tensor([[signed(mix(seed))] for seed, _ in pairs], device=GPU)
    indices_S1 = torch.tensor([[index] for _, index in pairs], device=GPU)
    for row_L, (seed, index) in zip(exponentials(states_S1, indices_S1, 300).tolist(), pairs, strict=True):
        assert row_L == pytest.approx([exponential(seed, index, lane) for lane in range(300)], rel=1e-14)


def test_a_gpu_draws_what_a_cpu_draws_from_the_same_logits():
    torch.manual_seed(7)
    logits_SV = torch.randn(100, 100_000)
    for fields in ({}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}):
        given = [SamplingParameters(temperature=1.0, **fields)] * 100
        assert tokens_of(logits_SV, given, device=GPU) == tokens_of(logits_SV, given)


def test_thresholds_are_those_of_the_cpu():
    torch.manual_seed(1)
    weights_SV = torch.rand(5, 129_280) ** 8
    masses_SV = (weights_SV * 2.0**40).long()
    targets_S1 = (
        masses_SV.sum(1, keepdim=True) * torch.tensor([[0.01], [0.3], [0.9], [0.999], [1.0]])
    ).long()
    expected = mass_threshold(weights_SV, masses_SV, targets_S1)
    assert torch.equal(
        mass_threshold(weights_SV.to(GPU), masses_SV.to(GPU), targets_S1.to(GPU)).cpu(), expected
    )


def test_tokens_do_not_depend_on_the_batch():
    torch.manual_seed(2)
    given = VARIED * 11
    logits_BV = (torch.randn(len(given), 32_000) * 3).bfloat16()
    together = tokens_of(logits_BV, given, ends=[5], prompt=[1, 2], output=[3], device=GPU)
    apart = [
        tokens_of(
            logits_BV[row : row + 1],
            [parameters],
            seeds=[row],
            ends=[5],
            prompt=[1, 2],
            output=[3],
            device=GPU,
        )[0]
        for row, parameters in enumerate(given)
    ]
    assert together == apart


def test_a_step_does_not_wait_for_the_device():
    """CUDA itself raises where it would; also where the batch has just changed."""
    sampler = Sampler(1000, GPU, [5])
    logits_BV = torch.randn(len(VARIED), 1000, device=GPU)
    names = list(range(len(VARIED)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, parameters in enumerate(VARIED):
            sampler.admit(name, parameters, name, [1, 2], [3])
        for _ in range(3):
            sampler.sample(logits_BV, names)
        sampler.release(2)
        names.remove(2)
        sampler.sample(logits_BV[1:], names)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_row_that_cannot_be_chosen_from_is_flagged_and_harms_no_other():
    torch.manual_seed(3)
    logits_BV = torch.randn(len(VARIED), 4000)
    clean = tokens_of(logits_BV, VARIED, device=GPU)
    logits_BV[0, 7], logits_BV[2, 7], logits_BV[3, :] = math.nan, math.inf, -math.inf
    result, _ = sampled(logits_BV, VARIED, device=GPU)
    assert result.failed_B.tolist() == [True, False, True, True, False, False]
    tokens = result.tokens_B.tolist()
    assert [tokens[row] for row in (1, 4, 5)] == [clean[row] for row in (1, 4, 5)]
    assert all(0 <= token < 4000 for token in tokens)
