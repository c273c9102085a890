"""The model against transformers' own on the same checkpoints."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_worker
from tests.checkpoints import write_checkpoint

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
V2 = {"family": "deepseek_v2"}
GROUPED_V2 = V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
QWEN = {"family": "qwen3_moe"}
CONFIGURATIONS = {
    "as published, in small": {},
    "full queries": {"q_lora_rank": None},
    "one group": {"n_group": 1, "topk_group": 1},
    "all groups kept": {"n_group": 2, "topk_group": 2, "num_experts_per_tok": 4},
    "many experts": {"n_routed_experts": 32, "n_group": 8, "topk_group": 3, "num_experts_per_tok": 6},
    "weights not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "three shared experts": {"n_shared_experts": 3},
    "no dense layer": {"first_k_dense_replace": 0},
    "dense layers only": {"first_k_dense_replace": 9},
    "tied embeddings": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "attention bias, full queries": {"attention_bias": True, "q_lora_rank": None},
    "rotary halves": {"rope_interleave": False},
    "rotary halves, full queries": {"rope_interleave": False, "q_lora_rank": None},
    "yarn": {"rope_parameters": YARN},
    "yarn, DeepSeek's magnitudes": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn, other magnitudes": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}},
    "odd sizes": {
        "moe_intermediate_size": 7,
        "hidden_size": 52,
        "v_head_dim": 9,
        "kv_lora_rank": 11,
        "qk_nope_head_dim": 5,
    },
    "coarse norm": {"rms_norm_eps": 1e-2},
    "DeepSeek-V2-Lite, in small": V2 | {"q_lora_rank": None},
    "DeepSeek-V2, in small": GROUPED_V2 | {"routed_scaling_factor": 16.0},
    "V2, one of many groups": GROUPED_V2 | {"n_routed_experts": 16, "n_group": 8, "topk_group": 1},
    "V2, no groups named": V2 | {"n_group": None, "topk_group": None},
    "V2, many shared experts": V2 | {"n_shared_experts": 4, "first_k_dense_replace": 0},
    "V2, attention bias": V2 | {"attention_bias": True},
    "V2, tied embeddings": V2 | {"tie_word_embeddings": True},
    "V2, yarn": GROUPED_V2 | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "Qwen3-MoE, in small": QWEN,
    "Qwen3-MoE, weights not normalised": QWEN | {"norm_topk_prob": False},
    "Qwen3-MoE, one key head": QWEN | {"num_key_value_heads": 1},
    "Qwen3-MoE, as many key heads": QWEN | {"num_key_value_heads": 4},
    "Qwen3-MoE, dense layers between": QWEN | {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "Qwen3-MoE, attention bias": QWEN | {"attention_bias": True},
    "Qwen3-MoE, tied embeddings": QWEN | {"tie_word_embeddings": True},
    "Qwen3-MoE, yarn": QWEN | {"rope_parameters": YARN},
    "Qwen3-MoE, odd sizes": QWEN | {"hidden_size": 52, "head_dim": 10, "moe_intermediate_size": 7},
}


@pytest.fixture(params=CONFIGURATIONS, scope="module")
def pair(request, tmp_path_factory):
    """Our engine and transformers' model for one configuration."""
    directory = write_checkpoint(
        tmp_path_factory.mktemp("model"), seed=7, eos_token_id=None, **CONFIGURATIONS[request.param]
    )
    reference = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    reference.set_experts_implementation("eager")  # its faster ways refuse odd sizes
    return moe_worker.Engine(directory, threads=1), reference


def prompt(length, seed=0):
    return torch.randint(2, 320, (1, length), generator=torch.Generator().manual_seed(seed))


def test_logits_agree_with_transformers(pair):
    engine, reference = pair
    ids = prompt(100)
    with torch.no_grad():
        expected = reference(ids).logits[0]
    actual = engine.logits(ids[0].tolist())
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_greedy_text_agrees_with_transformers_over_64_tokens(pair):
    engine, reference = pair
    ids = prompt(20, seed=1)
    expected = reference.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)[0, 20:].tolist()
    [result] = engine.generate(ids[0].tolist(), moe_worker.SamplingParameters(max_tokens=64))
    assert result.token_ids == expected


def test_parameter_count_agrees_with_transformers(pair):
    engine, reference = pair
    assert engine.config.parameters_total == reference.num_parameters()


def test_a_sharded_checkpoint_is_the_same_model(tmp_path):
    whole = moe_worker.Engine(write_checkpoint(tmp_path / "whole"), threads=1)
    shards = write_checkpoint(tmp_path / "shards", max_shard_size="200KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    ids = prompt(30)[0].tolist()
    assert torch.equal(moe_worker.Engine(shards, threads=1).logits(ids), whole.logits(ids))


def test_bfloat16_weights_in_float32_are_exact(tmp_path):
    directory = write_checkpoint(tmp_path, dtype="bfloat16")
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = prompt(50)
    with torch.no_grad():
        expected = reference(ids).logits[0]
    actual = moe_worker.Engine(directory, threads=1).logits(ids[0].tolist())
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_bfloat16_stays_near_float32(tmp_path):
    """bf16 keeps 8 bits: over 3 layers the relative error stays around 2 %, unless routing flips."""
    directory = write_checkpoint(tmp_path, dtype="bfloat16", n_routed_experts=2, n_group=1, topk_group=1)
    ids = prompt(50)[0].tolist()
    exact = moe_worker.Engine(directory, threads=1).logits(ids)
    rough = moe_worker.Engine(directory, dtype="bfloat16", threads=1).logits(ids)
    assert (rough - exact).norm() <= 0.04 * exact.norm()
