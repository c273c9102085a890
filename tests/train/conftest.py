import json

import pytest

from tests.threads import one_thread

__all__ = ["CONFIG", "WORDS", "one_thread", "text_file"]

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
WORDS = ("the kernel maps a page of memory before the driver writes to it and the scheduler runs").split()  # noqa: SIM905 - reads better than a list


@pytest.fixture
def write_config(tmp_path):
    def write(**changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**CONFIG, **changes}))
        return path

    return write


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Sixty documents of sentences that a small model can learn in a few steps."""
    documents = [
        ". ".join(" ".join(WORDS[(i * 7 + j * k) % len(WORDS)] for k in range(9)) for j in range(12))
        for i in range(60)
    ]
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text("\0".join(documents))
    return path
