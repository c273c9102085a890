"""Each Triton kernel against plain float64 torch, on inputs drawn anew.

One command on a bare machine with torch, triton, transformers, safetensors and pytest:
    PYTHONPATH=worker:protos:. python -m pytest -p no:cacheprovider -o asyncio_mode= tests/gpu
"""

import math

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("triton")

from benchmarks.gpu_random import SMALL, PlainModel, plain_route, random_model, rounded_weight  # noqa: E402
from moe_worker.kernels.triton import attention, experts, latent, linear, norm, router, tiles  # noqa: E402
from moe_worker.models.cuda import DecodeGraph  # noqa: E402
from moe_worker.models.cuda_layer import split_dense  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# bf16 keeps 8 bits: a rounded value is off by at most 2**-9 of itself.
BF16 = 4e-3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(torch.seed() % 1000)


def randn(*sizes, dtype=torch.bfloat16):
    return torch.randn(*sizes, device=DEVICE).to(dtype)


def difference(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def poisoned(tokens, width):
    out = norm.Activation.empty(tokens, width, DEVICE)
    for tensor in (out.x_TD, out.scales_TX):
        tensor.fill_(math.nan)
    out.q_TD.fill_(77)
    return out


def from_int8(x):
    return (x.q_TD.double().unflatten(1, (-1, 64)) * x.scales_TX.double().unsqueeze(-1)).flatten(1)


def quantized(x_TI):
    """An activation whose int8 side is made by the norm kernel with a residual of unit rows."""
    out = poisoned(*x_TI.shape)
    ones = torch.ones(x_TI.shape[1], device=DEVICE, dtype=torch.bfloat16)
    norm.residual_norm(x_TI, None, ones, 1e-6, out, quantized=True)
    return out


@pytest.mark.parametrize(("tokens", "width", "summed"), [(1, 2048, 8), (5, 256, 1), (33, 192, 3)])
def test_residual_norm(tokens, width, summed):
    residual, added, weight = randn(tokens, width), randn(tokens * summed, width), randn(width)
    total = residual.double() + added.double().view(tokens, summed, width).sum(1)
    expected = total * torch.rsqrt(total.pow(2).mean(1, keepdim=True) + 1e-6) * weight.double()
    out = poisoned(tokens, width)
    norm.residual_norm(residual, added, weight, 1e-6, out, quantized=True)
    assert difference(residual, total) < BF16
    assert difference(out.x_TD, expected) < BF16
    top = out.x_TD.double().unflatten(1, (-1, 64)).abs().amax(-1, keepdim=True)
    error = (from_int8(out) - out.x_TD.double()).abs().unflatten(1, (-1, 64))
    assert (error <= top / 254 * 1.0001).all()


def test_packed_weights_are_the_rounded_ones():
    weight = randn(3, 40, 200)
    packed = tiles.pack_int4(weight)
    signed = packed.packed.view(torch.int8)
    values = torch.cat((signed << 4 >> 4, signed >> 4), dim=-1).double()
    whole = (values * packed.scales.double().unsqueeze(-1)).transpose(1, 2).flatten(2)[..., :200]
    assert torch.equal(whole, rounded_weight(weight))
    step = packed.scales.transpose(1, 2).repeat_interleave(128, dim=2)[..., :200].double()
    assert ((whole - weight.double()).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("tokens", [1, 16, 77, 300])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 200), (2048, 3648)])
def test_linear_w4a8(tokens, inputs, outputs):
    x, weight = quantized(randn(tokens, inputs)), randn(outputs, inputs)
    expected = from_int8(x) @ rounded_weight(weight).t()
    actual = linear.linear_w4a8(x, tiles.pack_int4(weight), torch.float32)
    assert difference(actual, expected) < 1e-5


@pytest.mark.parametrize("tokens", [1, 50])
def test_latents_are_written_where_they_belong(tokens):
    heads, plain, rope, rank = 4, 32, 16, 64
    joint = randn(tokens, heads * (plain + rope) + rank + rope)
    query, row = joint[:, : -rank - rope], joint[:, -rank - rope :]
    weights = latent.LatentWeights(randn(rank), randn(heads, plain, rank), 1e-6)
    angles = torch.rand(100, rope // 2, device=DEVICE) * 6
    table = torch.stack((angles.cos(), angles.sin()), dim=-1)
    positions = torch.randint(100, (tokens,), device=DEVICE)
    rows = torch.randperm(128, device=DEVICE)[:tokens]
    cache = torch.full((128, rank + rope), 7.0, device=DEVICE, dtype=torch.bfloat16)
    out = torch.full((tokens, heads, rank + rope), math.nan, device=DEVICE, dtype=torch.bfloat16)
    latent.write_latents(query, row, weights, table, positions, rows, cache, out)

    def turned(x):
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        rotation = torch.view_as_complex(table.double())[positions]
        rotation = rotation.view(tokens, *[1] * (pairs.dim() - 2), -1)
        return torch.view_as_real(pairs * rotation).flatten(-2)

    key = row[:, :rank].double()
    normed = key * torch.rsqrt(key.pow(2).mean(1, keepdim=True) + 1e-6) * weights.norm_R.double()
    assert difference(cache[rows], torch.cat((normed, turned(row[:, rank:])), dim=1)) < BF16
    untouched = torch.ones(128, dtype=torch.bool, device=DEVICE).index_fill_(0, rows, False)
    assert (cache[untouched] == 7).all()
    query_THE = query.unflatten(1, (heads, -1))
    absorbed = torch.einsum("thn,hnr->thr", query_THE[..., :plain].double(), weights.key_HNR.double())
    expected = torch.cat((absorbed, turned(query_THE[..., plain:])), dim=-1)
    assert difference(out, expected) < BF16


@pytest.mark.parametrize("slices", [1, 4, 16])
@pytest.mark.parametrize("counts", [[1, 1, 1], [9, 1, 30]])
def test_attention_over_pages_and_the_merge_of_slices(slices, counts):
    heads, rank, rope, value, page = 4, 64, 16, 64, 32
    most = 1 if max(counts) == 1 else 4
    ends = [1, 95, 64] if most == 1 else [9, 33, 64]
    pages = torch.randperm(9, device=DEVICE).view(3, 3).int()
    cache = randn(9 * page, rank + rope)
    positions = torch.cat([torch.arange(e - c, e, device=DEVICE) for c, e in zip(counts, ends, strict=True)])
    tokens = sum(counts)
    query = randn(tokens, heads, rank + rope)
    entries, first = [], 0
    for sequence, count in enumerate(counts):
        entries += [(sequence, first + cut, min(most, count - cut)) for cut in range(0, count, most)]
        first += count
    cut_3C = torch.tensor(entries, device=DEVICE, dtype=torch.int32).t().contiguous()
    token_tiles = attention.TokenTiles(cut_3C[0], cut_3C[1], cut_3C[2], most)
    parts, lse = attention.attend(query, cache, pages, positions, token_tiles, rank, page, 0.1, slices)
    weight = randn(heads, rank, value)
    expected, sequence_T = [], torch.repeat_interleave(torch.tensor(counts)).tolist()
    for t in range(tokens):
        rows = torch.cat([cache[int(p) * page : (int(p) + 1) * page] for p in pages[sequence_T[t]]])
        rows = rows[: int(positions[t]) + 1].double()
        shares = (query[t].double() @ rows.t() * 0.1).softmax(-1)
        expected.append(torch.einsum("hr,hrv->hv", shares @ rows[:, :rank], weight.double()).flatten())
    expected = torch.stack(expected)
    for int8 in (False, True):
        out = poisoned(tokens, heads * value)
        attention.merge_values(parts, lse, weight, out, int8)
        assert difference(from_int8(out) if int8 else out.x_TD, expected) < (0.015 if int8 else 0.01)


CHOICES = {
    "sigmoid": router.Choice(6, 2, 1, 1, sigmoid=True, normalise=True, scale=1.0),
    "softmax": router.Choice(2, 0, 1, 1, sigmoid=False, normalise=False, scale=16.0),
    "groups by two": router.Choice(4, 1, 8, 3, sigmoid=True, normalise=True, scale=2.5),
    "groups by one": router.Choice(3, 2, 4, 2, sigmoid=False, normalise=True, scale=1.0, pair=False),
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("tokens", [1, 37])
def test_router(choice, tokens):
    x, weight, bias = (
        randn(tokens, 320),
        randn(64, 320, dtype=torch.float32) / 18,
        torch.randn(64, device=DEVICE) / 20,
    )
    counts = torch.zeros(64 + choice.shared, dtype=torch.int32, device=DEVICE)
    chosen, weights = router.route(x, weight, bias, choice, counts)
    expected = plain_route(x.double() @ weight.double().t(), bias.double(), choice)
    actual = torch.zeros_like(expected).scatter(1, chosen.long(), weights.double())
    assert difference(actual, expected) < 1e-5
    assert torch.equal(counts.long(), (expected > 0).sum(0))


@pytest.mark.parametrize(("tokens", "size"), [(1, 16), (40, 16), (300, 32)])
def test_tokens_are_sorted_by_expert(tokens, size):
    chosen = torch.randint(12, (tokens, 3), device=DEVICE, dtype=torch.int32)
    chosen[chosen == 5] = 6  # an expert that nobody takes
    counts = chosen.flatten().bincount(minlength=12).int()
    blocks = experts.sort_by_expert(chosen, counts, size)
    seen = []
    for rows, owner in zip(blocks.rows.view(-1, size).tolist(), blocks.experts_C.tolist(), strict=True):
        if owner < 0:
            continue
        own = [row for row in rows if row < chosen.numel()]
        assert own
        assert own == sorted(own)
        assert all(int(chosen.flatten()[row]) == owner for row in own)
        seen += own
    assert sorted(seen) == list(range(chosen.numel()))


@pytest.mark.parametrize("int4", [False, True], ids=["bf16", "w4a8"])
@pytest.mark.parametrize("tokens", [1, 20, 150])
def test_experts(int4, tokens):
    count, width, inner, per_token = 6, 256, 128, 3
    x = quantized(randn(tokens, width))
    gate_up, down = randn(count, 2 * inner, width) / 16, randn(count, width, inner) / 11
    chosen = torch.rand(tokens, count, device=DEVICE).topk(per_token).indices.int()
    shares = torch.rand(tokens, per_token, device=DEVICE)
    blocks = experts.sort_by_expert(chosen, chosen.flatten().bincount(minlength=count).int(), 16)
    if int4:
        out = experts.experts_w4a8(x, tiles.pack_int4(gate_up), tiles.pack_int4(down), blocks, shares)
        values, gate_up, down = from_int8(x), rounded_weight(gate_up), rounded_weight(down)
    else:
        out = experts.experts_bf16(x.x_TD, gate_up, down, blocks, shares)
        values = x.x_TD.double()
    for t in range(tokens):
        for k in range(per_token):
            gate, up = (gate_up[chosen[t, k]].double() @ values[t]).chunk(2)
            expected = down[chosen[t, k]].double() @ (gate.sigmoid() * gate * up) * shares[t, k].double()
            assert difference(out[t * per_token + k], expected) < (0.02 if int4 else 0.01)


def test_a_dense_block_is_the_sum_of_its_experts():
    gate_up, down, x = (
        torch.randn(100, 16).double(),
        torch.randn(16, 50).double(),
        torch.randn(4, 16).double(),
    )
    gate, up = (x @ gate_up.t()).chunk(2, dim=1)
    expected = (torch.nn.functional.silu(gate) * up) @ down.t()
    total = torch.zeros_like(x)
    for own_gate_up, own_down in zip(*split_dense(gate_up, down, 32), strict=True):
        gate, up = (x @ own_gate_up.t()).chunk(2, dim=1)
        total += (torch.nn.functional.silu(gate) * up) @ own_down.t()
    assert torch.allclose(total, expected)


@pytest.mark.parametrize("int4", [False, True], ids=["bf16", "w4a8"])
def test_decode_under_a_graph_follows_the_plain_model(int4):
    """A token is right if plain float64 gives it the best score but for the error of the format."""
    with torch.inference_mode():
        model, layers, head = random_model(SMALL, 32, 64, int4, DEVICE)
        plain = PlainModel(SMALL, model.embedding_VD, layers, head, int4)
        prompt = torch.randint(SMALL.vocabulary, (60,), device=DEVICE)
        graph = DecodeGraph(model, 1, 4)
        graph.pages_BP.copy_(torch.tensor([[3, 1, 5, 7]], device=DEVICE))
        shared = model.prefill_pass([0], [60], graph.pages_BP)
        graph.tokens_B.copy_(model.logits(*model.forward(prompt, shared))[-1:].argmax(-1))
        graph.positions_B.fill_(60)
        graph.capture()
        shared = model.prefill_pass([0], [60], graph.pages_BP)
        model.forward(prompt, shared)  # recording wrote behind the prompt only, but poison would show here
        text = torch.cat((prompt, graph.tokens_B))
        for _ in range(10):
            graph.step()
            scores = plain.logits(text)[-1]
            assert scores.max() - scores[graph.tokens_B] < 0.5 * scores.std()
            text = torch.cat((text, graph.tokens_B))
    assert int(graph.positions_B) == 70
