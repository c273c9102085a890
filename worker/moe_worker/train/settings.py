"""What `moe-worker train` can be told, apart from the model's shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainSettings:
    """The defaults suit a dozen million parameters and some fifty megabytes of text."""

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
    """Optimizer steps."""
    batch: int = 128
    """Windows in a step."""
    window: int = 1024
    """Tokens in a window."""
    learning_rate: float = 8e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Of matrices; embeddings and norms have none."""
    dropout: float = 0.2
    """Of embeddings and of what each sublayer adds: a small corpus seen sixty times overfits without."""
    warmup: int = 200
    """Steps of rising learning rate."""
    decay_share: float = 0.6
    """Share of the steps over which the learning rate falls to zero."""
    balance_speed: float = 1e-3
    """How far a step moves the routers' balancing bias."""
    seed: int = 0
    """Of initial weights, dropout and the order of windows."""
    evaluate_every: int = 1500
    """Steps between scores on the validation text."""
    checkpoint_every: int = 1500
    """Steps between states from which an interrupted run resumes."""
    stop_after: float | None = None
    """Seconds after which the run saves its state and ends early, to be resumed by the same command."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
