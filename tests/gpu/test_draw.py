"""The kernels that draw tokens against the reference, which tests/worker/test_sampling.py examines."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from moe_worker.kernels import draw
from moe_worker.kernels.likeliest import Likeliest
from moe_worker.kernels.triton.draw import draw_tokens
from moe_worker.kernels.triton.greedy import best_tokens
from moe_worker.sampling.adjust import TokenCounts
from moe_worker.sampling.batch import Row, build
from moe_worker.sampling.parameters import SamplingParameters
from tests.gpu.device import DEVICE, needs_device

pytestmark = needs_device
VARIED = [
    SamplingParameters(temperature=1.0),
    SamplingParameters(temperature=0.7, top_p=0.9),
    SamplingParameters(),
    SamplingParameters(temperature=1.3, top_k=50),
    SamplingParameters(temperature=1.0, top_k=3000, top_p=0.97),
    SamplingParameters(temperature=0.6, top_k=20, top_p=0.95, min_p=0.01),
    SamplingParameters(temperature=2.0, min_p=0.03),
]


def drawn(draw_with, scores_BV, parameters, seeds, index=0, step=0):
    """What `draw_with` draws, -1 for greedy rows, and 0 for rows that fail, as the likeliest tokens have."""
    rows = [Row(each, seed, index, frozenset()) for each, seed in zip(parameters, seeds, strict=True)]
    batch = build(range(len(rows)), rows, TokenCounts(scores_BV.shape[1], DEVICE), DEVICE)
    best = Likeliest(*best_tokens(scores_BV))
    out_B = best.failed_B.long() - 1
    for part in batch.sampling:
        draw_with(scores_BV, best, part, step, out_B)
    return out_B.tolist()


def check(scores_BV, parameters, seeds, index=0, step=0):
    """The tokens of the kernels, which are those of the reference."""
    found = drawn(draw_tokens, scores_BV, parameters, seeds, index, step)
    assert found == drawn(draw.draw_plain, scores_BV, parameters, seeds, index, step)
    return found


@pytest.mark.parametrize("vocabulary", [100, 256, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_tokens_are_those_of_the_reference(vocabulary, dtype, spread):
    parameters = VARIED if DEVICE.type == "cpu" else VARIED * 20
    scores_BV = torch.randn(len(parameters), vocabulary + 3, device=DEVICE) * spread
    seeds = torch.randint(2**62, (len(parameters),)).tolist()
    found = check(scores_BV.to(dtype)[:, :vocabulary], parameters, [*seeds[1:], 2**64 - 1], 2**31, 5)
    assert found[2] == -1


def test_refused_tokens_ties_and_a_single_token():
    scores_BV = torch.full((4, 700), -math.inf, device=DEVICE)
    scores_BV[0, 601] = 3.0  # one token is allowed
    scores_BV[1, ::7] = 0.0  # as an output format's mask leaves them: 100 equal ones
    scores_BV[2], scores_BV[3, [5, 300, 699]] = 0.0, torch.tensor([1e38, -1e38, 9e37], device=DEVICE)
    for fields in (
        {},
        {"top_p": 0.5},
        {"top_k": 3},
        {"top_k": 3, "top_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 150},
    ):
        parameters = [SamplingParameters(temperature=1.0, **fields)] * 4
        found = [check(scores_BV, parameters, [seed] * 4) for seed in range(6)]
        first, second, third, fourth = zip(*found, strict=True)
        assert set(first) == {601}
        assert set(fourth) == {5}
        assert not any(token % 7 for token in second)
        assert min(len(set(second)), len(set(third))) > 3, "ties with the last token stay"


def test_rows_that_fail_stay_0_and_harm_no_other():
    scores_BV = torch.randn(5, 700, device=DEVICE)
    parameters = [SamplingParameters(temperature=1.0, top_p=0.8)] * 5
    clean = check(scores_BV, parameters, range(5))
    scores_BV[0, 621], scores_BV[1, 17], scores_BV[2] = math.nan, math.inf, -math.inf
    assert check(scores_BV, parameters, range(5)) == [0, 0, 0, *clean[3:]]


def test_tokens_do_not_depend_on_the_batch():
    """Truncated rows among others, next to rows of other lengths of their lists."""
    scores_BV = torch.randn(len(VARIED), 6000, device=DEVICE) * 2
    together = check(scores_BV, VARIED, range(len(VARIED)))
    for row, parameters in enumerate(VARIED):
        assert check(scores_BV[row : row + 1], [parameters], [row]) == [together[row]]


@settings(deadline=None, max_examples=20 if DEVICE.type == "cpu" else 200)
@given(
    st.sampled_from([0.0, 0.01, 1.0, 12.0]), st.integers(0, 2**31), st.integers(0, 2**20),
    st.integers(0, 1100), st.floats(0.0, 1.0, exclude_min=True), st.sampled_from([0.0, 0.001, 0.5]),
)  # fmt: skip
def test_any_truncation_is_that_of_the_reference(spread, seed, index, top_k, top_p, min_p):
    generator = torch.Generator().manual_seed(seed)
    scores_BV = (torch.randn(3, 1000, generator=generator) * spread).to(DEVICE)
    parameters = SamplingParameters(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    check(scores_BV, [parameters] * 3, [seed, 0, 2**64 - 1], index)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device for so many draws")
@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}, {"top_k": 100}])
def test_frequencies_follow_the_softmax(fields):
    """Over 1,000 tokens in four blocks; Pearson's chi-square."""
    scores_V, count = torch.randn(1000, dtype=torch.float64) * 2, 50_000
    parameters = SamplingParameters(temperature=1.0, **fields)
    order = scores_V.argsort(descending=True)
    shares = scores_V.softmax(0)[order]
    kept = (
        int((shares.cumsum(0) < parameters.top_p).sum()) + 1
        if "top_p" in fields
        else fields.get("top_k", 1000)
    )
    expected = torch.zeros(1000, dtype=torch.float64)
    expected[order[:kept]] = shares[:kept] / shares[:kept].sum() * count
    scores_BV = scores_V.float().to(DEVICE).expand(count, -1)
    found = torch.tensor(drawn(draw_tokens, scores_BV, [parameters] * count, range(count))).bincount(
        minlength=1000
    )
    assert found[expected == 0].sum() == 0
    often = expected >= 5
    seen = torch.cat((found[often], found[~often].sum().view(1)))
    wanted = torch.cat((expected[often], expected[~often].sum().view(1).clamp(min=1e-9)))
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    p_value = torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2, dtype=torch.float64), statistic / 2)
    assert p_value > 1e-3
