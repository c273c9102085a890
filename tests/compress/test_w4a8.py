"""Rounding while training: the same numbers as the served kernels', and gradients that still teach."""

import statistics
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu_random import SMALL, RandomSource, config_of
from moe_worker.compress.w4a8 import Int4Trainer, pack_weight, round_heads, round_tokens, round_weight
from moe_worker.models.attention_build import latent_attention
from moe_worker.quant.int4 import quantize_int4, search_scales
from moe_worker.quant.int8 import piece_of, round_pieces

QUICK = settings(max_examples=50, deadline=None)
shapes = st.tuples(st.integers(1, 2), st.integers(1, 7), st.sampled_from([3, 32, 64, 100, 256]))


def random(shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@QUICK
@given(shape=shapes, seed=st.integers(0, 99), group=st.sampled_from([32, 64, 128]), moved=st.floats(0.5, 2))
def test_what_is_trained_is_what_is_packed_to_the_bit(shape, seed, group, moved):
    weight = random(shape, seed)
    scales = search_scales(weight, group, torch.bfloat16) * moved
    packed = pack_weight(weight, scales, group)
    exact = replace(packed, scales_OG=packed.scales_OG.float())  # the dtype of scales is that of the product
    assert torch.equal(round_weight(weight, scales, group), exact.dequantize())


@QUICK
@given(shape=shapes, seed=st.integers(0, 99), group=st.sampled_from([32, 128]))
def test_the_search_finds_what_the_engine_rounds_to(shape, seed, group):
    weight = random(shape, seed) ** 3  # outliers
    ours = pack_weight(weight, search_scales(weight, group, torch.bfloat16), group)
    engine = quantize_int4(weight, group, torch.bfloat16)
    assert torch.equal(ours.scales_OG, engine.scales_OG)
    assert torch.equal(ours.values(), engine.values())


@QUICK
@given(tokens=st.integers(1, 5), width=st.integers(1, 200), seed=st.integers(0, 99))
def test_tokens_are_rounded_as_they_will_be_served(tokens, width, seed):
    x = random((1, tokens, width), seed).requires_grad_()
    rounded = round_tokens(x, piece_of(width))
    truth = round_pieces(x[0].detach(), piece_of(width))
    torch.testing.assert_close(rounded[0], truth, atol=1e-6, rtol=1e-5)
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_w_uk_and_w_uv_are_rounded_as_they_will_be_served(monkeypatch):
    config = config_of(SMALL)
    latent, source = config.latent, RandomSource(torch.device("cpu"), torch.float32, "w4a8")
    heads, plain = latent.num_attention_heads, latent.qk_nope_head_dim
    weight = random((heads * (plain + latent.v_head_dim), latent.kv_lora_rank), 0).bfloat16().float()
    take = source.take
    monkeypatch.setattr(source, "take", lambda name, *shape: weight if "kv_b" in name else take(name, *shape))
    served = latent_attention(latent, config.hidden_size, source, "layer")
    weight.requires_grad_()
    trained = round_heads(weight, heads, plain)
    trained.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    key, value = trained.detach().unflatten(0, (heads, -1)).tensor_split([plain], dim=1)
    assert torch.equal(served.key_HNR, key)
    assert torch.equal(served.value_HRV, value.transpose(1, 2))


def test_clipped_weights_get_no_gradient_and_their_scale_gets_it_instead():
    weight = torch.tensor([[1.0, 0.9, -0.2, 0.1]], requires_grad=True)
    scales = torch.tensor([[0.1]], requires_grad=True)
    round_weight(weight, scales, 32).sum().backward()
    assert weight.grad.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    assert scales.grad.item() > 13  # two clipped weights grow by 7 times what the scale grows by


def trained_over_nearest(seed):
    """Loss of a regression after training with rounding, over that of the nearest rounded weights.

    Its inputs are correlated, so the best rounded weights are not the nearest ones.
    """
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(32, 32, generator=generator) / 32**0.5 + torch.ones(32, 32) / 8
    truth = torch.randn(16, 32, generator=generator)

    def loss(weight):
        x = torch.randn(256, 32, generator=generator) @ mix
        return (x @ (weight - truth).T).square().mean()

    def expected(weight):
        """Of `loss`, over all inputs."""
        return (mix @ (weight - truth).T).square().sum(0).mean()

    weight = torch.nn.Parameter(truth.clone())
    trainer = Int4Trainer({"w": weight}, first=0, group=32)
    groups = [{"params": [weight], "peak": 5e-3}, {"params": list(trainer.parameters()), "peak": 1e-3}]
    optimizer = torch.optim.Adam(groups)
    trainer.update(0, {"w": weight})
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 - step / 600)
        optimizer.zero_grad()
        loss(trainer.round_weights({"w": weight})["w"]).backward()
        optimizer.step()
    with torch.no_grad():
        trained = expected(round_weight(weight, trainer.scales("w"), 32))
        nearest = expected(round_weight(truth, search_scales(truth, 32, torch.bfloat16), 32))
    return float(trained / nearest)


def test_training_with_rounding_beats_rounding_after_training():
    assert statistics.mean(trained_over_nearest(seed) for seed in range(3)) < 0.85


def test_ranges_are_searched_once_and_go_through_a_state_dict():
    weight = random((2, 64), 1) ** 3
    trainer = Int4Trainer({"a.b": weight}, first=10, group=32)
    trainer.update(9, {"a.b": weight})
    assert (trainer.scales("a.b") == 1).all()
    trainer.update(10, {"a.b": weight})
    assert torch.equal(trainer.scales("a.b"), search_scales(weight, 32, torch.bfloat16))
    trainer.update(11, {"a.b": weight * 2})
    other = Int4Trainer({"a.b": weight}, first=10, group=32)
    other.load_state_dict(trainer.state_dict())
    assert torch.equal(other.scales("a.b"), search_scales(weight, 32, torch.bfloat16))
