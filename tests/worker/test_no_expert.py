"""Expert -1 is none, in every way of computing experts on a CPU: it adds nothing, and nothing is computed.

Each way is compared with the sum over a token's experts one by one, and with the same choice where every
-1 is the last expert, which has no numbers: if its row were computed, the result would have none either.
The Triton kernels do the same in tests/gpu/test_triton_kernels.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_worker.config.moe import Level, Routing
from moe_worker.kernels.cpu import build, library, operations
from moe_worker.kernels.cpu.weights import pack_int4
from moe_worker.kernels.reference import group_by_expert, swiglu
from moe_worker.moe.counting import Choice, ExpertCounter
from moe_worker.moe.experts import Experts
from moe_worker.moe.router import choose, scores
from moe_worker.quant.fp8 import quantize_fp8
from moe_worker.quant.int4 import quantize_int4
from moe_worker.quant.matrix import Dense, stack
from moe_worker.train.experts import chosen, experts_at_once, grouped_experts

try:
    ENGINES = [library.Kernels(name, 2) for name in library.supported_variants()]
except build.BuildError:
    ENGINES = []

COUNT, WIDTH, INNER = 5, 128, 64
CASES = settings(max_examples=15)


@st.composite
def choices(draw):
    """Experts int64 [T, K], each once a token, some of them none, and weights."""
    tokens, per_token = draw(st.integers(1, 12)), draw(st.integers(1, COUNT))
    rows = [draw(st.permutations(range(COUNT)))[:per_token] for _ in range(tokens)]
    none = draw(st.lists(st.booleans(), min_size=tokens * per_token, max_size=tokens * per_token))
    experts = torch.tensor(rows).masked_fill(torch.tensor(none).view(tokens, per_token), -1)
    weights = torch.rand(tokens, per_token).masked_fill(experts < 0, 0)
    return experts, weights


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


GATE_UP, DOWN = random(COUNT, 2 * INNER, WIDTH, seed=0), random(COUNT, WIDTH, INNER, seed=1)


def one_by_one(x_TD, choice, gate_up=GATE_UP, down=DOWN):
    """The sum, expert by expert, of those that are one."""
    rows = []
    for x_D, experts_K, weights_K in zip(x_TD, *choice, strict=True):
        own = [(e, w) for e, w in zip(experts_K.tolist(), weights_K, strict=True) if e >= 0]
        row_D = torch.zeros_like(x_D)
        for expert, weight in own:
            row_D = row_D + weight * (down[expert] @ swiglu(gate_up[expert] @ x_D))
        rows.append(row_D)
    return torch.stack(rows)


@pytest.fixture
def unwritten_is_nan():
    """torch fills the memory that it hands out with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


FORMATS = {
    "dense": Dense,
    "odd sizes": Dense,
    "int4": quantize_int4,
    "fp8": lambda weight: stack([quantize_fp8(one) for one in weight]),
}


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("name", FORMATS)
@CASES
@given(choice=choices())
def test_plain_torch(name, choice):
    gate_up, down = GATE_UP, DOWN
    if name == "odd sizes":  # no whole pieces of 16 bytes: the plain loop
        gate_up, down = GATE_UP[:, :, :127], DOWN[:, :127]
    experts = Experts(FORMATS[name](gate_up), FORMATS[name](down))
    plain = [part.dequantize(torch.float32) for part in (experts.gate_up_AFD, experts.down_ADI)]
    x = random(len(choice[0]), gate_up.shape[2], seed=2)
    assert torch.allclose(experts.forward(x, *choice), one_by_one(x, choice, *plain), atol=1e-5)


@pytest.mark.usefixtures("unwritten_is_nan")
@CASES
@given(choice=choices())
def test_what_is_not_chosen_is_not_multiplied(choice):
    """An expert that has no numbers stands behind those that are chosen."""
    none = torch.full((1, 1, 1), torch.nan)
    gate_up = torch.cat((GATE_UP, none.expand(1, 2 * INNER, WIDTH)))
    down = torch.cat((DOWN, none.expand(1, WIDTH, INNER)))
    experts, x = Experts(Dense(gate_up), Dense(down)), random(len(choice[0]), WIDTH, seed=2)
    assert experts.forward(x, *choice).isfinite().all()


@pytest.mark.skipif(not ENGINES, reason="there is no C++ compiler")
@CASES
@given(choice=choices(), engine=st.sampled_from(ENGINES or [None]))
def test_native_kernels(choice, engine):
    """To the bit what the token's other experts give alone; scratch memory holds rows of other calls."""
    packed = pack_int4(quantize_int4(GATE_UP), paired=True), pack_int4(quantize_int4(DOWN))
    experts_TK, weights_TK = choice[0].int(), choice[1]
    x, _ = operations.quantize(engine, random(len(experts_TK), WIDTH, seed=2), packed[0])
    whole = experts_TK.clamp(min=0), torch.full_like(weights_TK, torch.nan)
    operations.experts(engine, x, *packed, whole)
    together = operations.experts(engine, x, *packed, (experts_TK, weights_TK))
    for t, (experts_K, weights_K) in enumerate(zip(experts_TK, weights_TK, strict=True)):
        kept = experts_K >= 0
        one, _ = operations.quantize(engine, random(len(experts_TK), WIDTH, seed=2)[t : t + 1], packed[0])
        alone = torch.zeros(1, WIDTH)
        if kept.any():
            own = experts_K[kept].unsqueeze(0), weights_K[kept].unsqueeze(0)
            alone = operations.experts(engine, one, *packed, own)
        assert torch.equal(together[t], alone[0])


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("way", [experts_at_once, grouped_experts])
@CASES
@given(choice=choices())
def test_the_trainer_and_its_gradients(way, choice):
    gate, up = GATE_UP.chunk(2, dim=1)
    leaves = [
        random(len(choice[0]), WIDTH, seed=2),
        *(w.clone() for w in (gate, up, DOWN)),
        choice[1].clone(),
    ]
    grads = []
    for one in (False, True):
        x, *weights, shares = (leaf.clone().requires_grad_() for leaf in leaves)
        if one:
            out = one_by_one(x, (choice[0], shares), torch.cat(weights[:2], dim=1), weights[2])
        else:
            out = way(x, tuple(weights), (choice[0], shares), rounded=False)
        if out.requires_grad:
            out.square().sum().backward()
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (x, *weights)]
        grads.append([out.detach(), *found])
    for ours, expected in zip(*grads, strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)


@CASES
@given(choice=choices())
def test_sorting_and_counting(choice):
    experts_TK, _ = choice
    order, ends = group_by_expert(experts_TK, COUNT)
    assert sorted(order.tolist()) == list(range(experts_TK.numel()))
    begin, rows = 0, experts_TK.flatten()
    for expert, end in enumerate(ends.tolist()):
        assert order[begin:end].tolist() == (rows == expert).nonzero().flatten().tolist()
        begin = end
    assert (rows[order[begin:]] == -1).all()

    counts = [int((rows == expert).sum()) for expert in range(COUNT)]
    place = Choice()
    counter = ExpertCounter([3, 4], [place, Choice(torch.full_like(experts_TK, -1))], COUNT)
    place.experts_TK = experts_TK
    counter.count(len(experts_TK))
    assert counter.read() == (1, [(3, counts, sum(map(bool, counts))), (4, [0] * COUNT, 0)])
    assert chosen(torch.zeros(len(experts_TK), COUNT), experts_TK).sum(dim=0).tolist() == counts


@CASES
@given(
    tokens=st.integers(1, 9), groups=st.integers(1, 4), size=st.integers(2, 6), best=st.integers(1, 2),
    softmax=st.booleans(), normalise=st.booleans(), data=st.data(),
)  # fmt: skip
@pytest.mark.skipif(not ENGINES, reason="there is no C++ compiler")
def test_one_description_of_routing_means_one_choice(tokens, groups, size, best, softmax, normalise, data):
    """Plain torch (the trainer's as well) and the CPU kernels choose the same by one `Routing`."""
    kept = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, kept * size))
    routing = Routing(groups * size, 1, top_k, (Level(groups, kept, best),), softmax, normalise, 1.5)
    x, weight, bias = (
        random(*shape, seed=3) for shape in ((tokens, 64), (groups * size, 64), (groups * size,))
    )
    experts, weights = choose(scores(x @ weight.T, routing), bias, routing)
    native_experts, native_weights = operations.route(ENGINES[-1], x, weight, bias, routing)
    order, native_order = experts.argsort(dim=1), native_experts[:, :top_k].argsort(dim=1)
    assert torch.equal(experts.gather(1, order), native_experts[:, :top_k].long().gather(1, native_order))
    ours, theirs = weights.gather(1, order), native_weights[:, :top_k].gather(1, native_order)
    assert torch.allclose(ours, theirs, rtol=1e-4)
