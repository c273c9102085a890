"""The variants of the experiment: what each trains, and from what. Fixed before the first run.

Every variant sees the same number of training tokens: `steps` steps, which pruned variants split between the
training before and after pruning. (The training of a teacher does not count for its student.)

One seed, and 1,000 steps of 65,536 tokens, four epochs: that fits into twenty minutes of two GPUs, which were
available. So differences of some tenths of a percent may be chance, and all models could still learn. There
is no dropout, because no model sees the text often enough to overfit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEEDS = (0,)
SHARED: dict[str, Any] = {"batch": 64, "window": 1024, "learning_rate": 8e-3, "dropout": 0.0, "warmup": 100}
STEPS = 1000
# Sizes of the smoke test, which only shows that everything runs. Its numbers say nothing about quality.
SMOKE: dict[str, Any] = {"batch": 4, "window": 64, "learning_rate": 8e-3, "dropout": 0.0, "warmup": 2}
SMOKE_STEPS = 20
SMOKE_SHAPE = {
    "hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 256, "moe_intermediate_size": 128,
    "num_attention_heads": 8, "v_head_dim": 16, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "kv_lora_rank": 32, "vocab_size": 512,
}  # fmt: skip
# Sizes after pruning: about 42 % of the parameters.
LITE = {"layers": 7, "heads": 6, "experts": 8, "channels": 88, "dense_channels": 384}
SMOKE_LITE = {"layers": 3, "heads": 6, "experts": 4, "channels": 96, "dense_channels": 128}


@dataclass(frozen=True)
class Line:
    """One row of the table.

    settings: of the trainer, besides the shared ones. share: of the steps that this line itself trains; the
    line `after` trained the others. prune: rounds in which LITE is reached before or while training, 0: none.
    lite: trained at LITE's sizes from the start. teacher: the variant whose model is the teacher.
    """

    name: str
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    after: str | None = None
    prune: int = 0
    lite: bool = False
    teacher: str | None = None


ONCE = {"dense_share": 0.0, "shrink_share": 0.0}
AT_60 = {"dense_share": 0.6, "shrink_share": 0.0}
W4A8 = {"w4a8_share": 0.2}

LINES = (
    Line("dense", "dense, bf16"),
    Line("w4a8-rounded", "W4A8, post-training rounding", {"w4a8_share": 1.0}, 0.0, "dense"),
    Line("w4a8-trained", "W4A8, quantization-aware in the last 20 %", W4A8),
    Line("s24-cut", "2:4 pruned after training", {"sparsity": "s24", **ONCE}, 0.0, "dense"),
    Line("s14-cut", "1:4 pruned after training", {"sparsity": "s14", **ONCE}, 0.0, "dense"),
    Line("s24-tuned", "2:4 pruned at 60 %, then fine-tuned", {"sparsity": "s24", **AT_60}),
    Line("s14-tuned", "1:4 pruned at 60 %, then fine-tuned", {"sparsity": "s14", **AT_60}),
    Line("s24", "2:4 progressive", {"sparsity": "s24"}),
    Line("s14", "1:4 progressive, by magnitude", {"sparsity": "s14"}),
    Line("s14-gradient", "1:4 progressive, by gradient", {"sparsity": "s14", "saliency": "gradient"}),
    Line("s14-w4a8", "1:4 progressive + W4A8 quantization-aware", {"sparsity": "s14", **W4A8}),
    Line("s14-w4a8-taught", "the same, distilled", {"sparsity": "s14", **W4A8}, teacher="dense"),
    Line("half", "dense, half the steps (not in the table: the Lite variants start here)", share=0.5),
    Line("lite-cut", "Lite: pruned after training", {}, 0.0, "dense", prune=1),
    Line("lite-tuned", "Lite: pruned and fine-tuned in 3 rounds", {}, 0.5, "half", prune=3),
    Line("lite-taught", "Lite: pruned in 3 rounds, distilled", {}, 0.5, "half", prune=3, teacher="dense"),
    Line("lite-scratch", "Lite's size, trained from scratch", lite=True),
)  # fmt: skip


def shape(smoke: bool, lite: bool = False) -> dict[str, Any]:
    """The config.json of the trained models."""
    values: dict[str, Any] = json.loads((HERE / "config.json").read_text())
    values |= SMOKE_SHAPE if smoke else {}
    if lite:
        sizes = SMOKE_LITE if smoke else LITE
        values |= {
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "n_routed_experts": sizes["experts"],
            "moe_intermediate_size": sizes["channels"],
            "intermediate_size": sizes["dense_channels"],
        }
    return {**values, "num_key_value_heads": values["num_attention_heads"]}
