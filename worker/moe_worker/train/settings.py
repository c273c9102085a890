"""Settings of `moe-worker train`, apart from the shape of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from moe_worker.errors import SettingsError

OPTIMIZERS = ("muon", "adamw")
SPARSITIES = ("none", "s14", "s24")
SALIENCIES = ("magnitude", "gradient")
BALANCES = ("bias", "coefficient")
PRECISIONS = ("bfloat16", "float32")


TOLD: Final = 1000
"""Larger upper bounds only keep numbers from overflowing."""


class Range(NamedTuple):
    """Bounds of a number, both inclusive unless `above`: then it must be greater than `least`."""

    least: float
    most: float = math.inf
    above: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return (self.least < value if self.above else self.least <= value) and value <= self.most

    def __str__(self) -> str:
        least = f"above {self.least:g}" if self.above else f"{self.least:g} or more"
        if math.isinf(self.most):
            return f"finite and {least}"
        return (
            f"from {self.least:g} to {self.most:g}" if self.most <= TOLD else f"{least}, below {self.most:g}"
        )


_COUNT: Final = 1 << 40
_SIZE: Final = 1 << 24
_SHARE: Final = Range(0, 1)
RANGES: Final = {
    "steps": Range(0, _COUNT),
    "batch": Range(1, _SIZE),
    "window": Range(2, _SIZE),
    "learning_rate": Range(0, above=True),
    "weight_decay": Range(0),
    "clip_norm": Range(0),
    "dropout": Range(0, 0.9),
    "warmup": Range(0, _COUNT),
    "decay_share": _SHARE,
    "balance_speed": Range(0),
    "sequence_balance": Range(0),
    "balance_strength": Range(0),
    "expert_cost": Range(0),
    "mass_after": _SHARE,
    "domain_share": Range(0),
    "dense_share": _SHARE,
    "shrink_share": _SHARE,
    "w4a8_share": _SHARE,
    "group": Range(8, _SIZE),
    "teacher_share": _SHARE,
    "teacher_top": Range(1, 256),
    "hidden_share": Range(0),
    "seed": Range(0, (1 << 63) - 1),
    "evaluate_every": Range(1, _COUNT),
    "checkpoint_every": Range(1, _COUNT),
    "stop_after": Range(0),
}
"""Of all numbers: the options of `moe-worker train`, recipes and the library refuse others."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a run. The defaults suit about 12 million parameters and 50 MB of text."""

    data: Path
    """Training text."""
    out: Path
    """Folder that receives the checkpoint, its state, metrics.jsonl and loss.png."""
    config: Path
    """config.json of the model to train."""
    valid: Path | None = None
    """Text to score along the way."""
    start_from: Path | None = None
    """Checkpoint directory of the same shape whose weights and tokenizer to start with."""
    tokenizer: Path | None = None
    """tokenizer.json to use; by default one is trained on the training text."""
    steps: int = 9000
    """Optimizer steps; 0 compresses a checkpoint as it is."""
    batch: int = 128
    """Windows in a step."""
    window: int = 1024
    """Tokens in a window."""
    learning_rate: float = 8e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Weight decay of matrices; embeddings and norms have none."""
    optimizer: str = "muon"
    """muon for the matrices inside the layers and AdamW for the rest, or adamw for all."""
    precision: str = "bfloat16"
    """What products are computed in; float32 is faster on a CPU without instructions for bfloat16."""
    clip_norm: float = 1.0
    """Largest norm of the gradient of all weights; longer ones are scaled down. 0: no limit."""
    dropout: float = 0.2
    """Dropout of embeddings and of the output of each sublayer: a small corpus seen sixty times overfits
    without it.
    """
    warmup: int = 200
    """Steps of rising learning rate."""
    decay_share: float = 0.6
    """Share of the steps over which the learning rate falls to zero."""
    balance_speed: float = 1e-3
    """Change of the balancing bias of routers per step."""
    sequence_balance: float = 1e-4
    """Weight of the sequence balance loss, in addition to the bias that balances batches."""
    balance: str = "bias"
    """What balances experts: a bias moved step by step, or the load-balance coefficient 1 / (load + eps)."""
    balance_strength: float = 0.05
    """Of the coefficient: the largest difference that it makes to an expert's score."""
    expert_cost: float = 0.0
    """Weight of the cost of experts, in models whose config.json has a routing.mass below 1."""
    mass_after: float = 0.0
    """Share of the steps that train with all experts; then the mass falls to that of config.json, and the
    cost of experts rises, over half of the remaining steps.
    """
    domains: Path | None = None
    """Labels of the training documents, one a line: domains that groups of experts are led to."""
    domain_share: float = 0.0
    """Weight of that hint in the loss."""
    sparsity: str = "none"
    """s14 or s24: trains the matrices inside the layers to keep 1 or 2 of four consecutive inputs."""
    dense_share: float = 0.2
    """Share of the steps, the first ones, that train dense."""
    shrink_share: float = 0.6
    """Share of the steps, the next ones, in which masks tighten and weights may come back."""
    saliency: str = "magnitude"
    """Importance of weights for masks: magnitude or gradient."""
    w4a8_share: float = 0.0
    """Share of the steps, the last ones, that compute with int4 weights and int8 activations."""
    group: int = 128
    """Inputs of a four-bit matrix that share a scale."""
    teacher: Path | None = None
    """Checkpoint directory of a model to learn from, in addition to the text."""
    teacher_share: float = 0.5
    """Weight of the teacher in the loss; the text has the rest."""
    teacher_top: int = 16
    """Most likely tokens of the teacher that are kept on disk for each token of the text."""
    hidden_share: float = 0.0
    """Weight of the distance to the teacher's last hidden states; the teacher then runs during training."""
    cache: Path | None = None
    """Folder for encoded texts and teachers' tokens, which runs share; by default the parent of `out`."""
    seed: int = 0
    """Seed of initial weights, dropout and the order of windows."""
    evaluate_every: int = 1500
    """Steps between scores on the validation text."""
    checkpoint_every: int = 1500
    """Steps between states from which an interrupted run resumes."""
    stop_after: float | None = None
    """Seconds after which the run saves its state and ends early, to be resumed by the same command."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""

    @property
    def shared(self) -> Path:
        """The folder for files that runs share."""
        return self.cache or self.out.parent

    def __post_init__(self) -> None:
        """Raises SettingsError for an unknown choice, a number out of range, or shares that do not add up."""
        for name, allowed in (
            ("optimizer", OPTIMIZERS),
            ("sparsity", SPARSITIES),
            ("saliency", SALIENCIES),
            ("balance", BALANCES),
            ("precision", PRECISIONS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise SettingsError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        if self.domain_share > 0 and self.domains is None:
            raise SettingsError(
                f"domain_share is {self.domain_share:g}, but there are no labels; set domains"
            )
        if self.hidden_share > 0 and self.teacher is None:
            raise SettingsError(
                f"hidden_share is {self.hidden_share:g}, but there is no teacher; set teacher"
            )
        for name, numbers in RANGES.items():
            value = getattr(self, name)
            if value is not None and value not in numbers:
                raise SettingsError(f"{name} is {value}; it must be {numbers}")
        if self.dense_share + self.shrink_share > 1:
            raise SettingsError(
                f"dense_share and shrink_share make {self.dense_share + self.shrink_share:g} of the steps; "
                "together they must be at most 1"
            )
