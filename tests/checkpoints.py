"""Random checkpoints for tests, written by transformers: small enough to load in milliseconds."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM

DEEPSEEK: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": DEEPSEEK | {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 0},
    "deepseek_v2": DEEPSEEK | {"n_group": 1, "topk_group": 1},
    "qwen3_moe": {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}


def write_checkpoint(
    directory: Path,
    seed: int = 0,
    max_shard_size: str = "1GB",
    dtype: str = "float32",
    family: str = "deepseek_v3",
    **changes: Any,
) -> Path:
    """A checkpoint of a family with random weights, its FAMILIES entry with `changes`, and its tokenizer.

    Weights are larger than transformers would make them, and the routing bias is not zero: with its own
    initialisation every expert does nearly nothing and the bias, which decides the routing, is zero.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **FAMILIES[family] | changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(1.0, 0.1)
            else:
                weight.normal_(0.0, 1.5 * weight.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    write_tokenizer(directory, config.vocab_size)
    return directory


def write_tokenizer(directory: Path, vocab_size: int = 320) -> None:
    """A byte-level BPE tokenizer of two special tokens, the 256 bytes, and merges up to `vocab_size`.

    It puts <|begin|> before a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 320),
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog, naïve café 日本語 🙂 " * 4], trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
