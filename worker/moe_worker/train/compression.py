"""The matrices that a run compresses, and their values at a step."""

from __future__ import annotations

from typing import Literal, cast

from torch import Tensor, nn

from moe_worker.compress.sparsity import PATTERNS, Schedule, Sparsifier
from moe_worker.compress.w4a8 import Int4Trainer, round_heads
from moe_worker.errors import SettingsError
from moe_worker.train.model import TrainingModel
from moe_worker.train.settings import TrainSettings

HEAD = "lm_head.weight"


class Compression(nn.Module):
    """Masks and rounding of a model's matrices; its state is saved with the model.

    Projections and experts inside the layers become sparse. Routers, norms and embeddings stay dense, and so
    does kv_b_proj, which serving absorbs into queries and outputs: w4a8 rounds it to int8. The output head is
    quantized to int4, too.
    """

    sparsifier: Sparsifier | None
    int4: Int4Trainer | None

    def __init__(self, model: TrainingModel, settings: TrainSettings) -> None:
        """Raises SettingsError if the sizes of the model do not allow this compression."""
        super().__init__()
        matrices = compressible(model)
        self.sparsifier = self.int4 = None
        self._latent = model.config.latent
        if settings.sparsity != "none":
            kept = PATTERNS[settings.sparsity].kept
            schedule = Schedule(settings.steps, kept, settings.dense_share, settings.shrink_share)
            saliency = cast("Literal['magnitude', 'gradient']", settings.saliency)
            self.sparsifier = Sparsifier(matrices, schedule, saliency)
        if settings.w4a8_share:
            packed = {**matrices, HEAD: model.lm_head.weight}
            check_groups(packed, settings.group)
            first = round(settings.steps * (1 - settings.w4a8_share))
            self.int4 = Int4Trainer(packed, first, settings.group)

    def rounds(self, step: int) -> bool:
        """Whether activations are rounded at `step`."""
        return self.int4 is not None and self.int4.is_active(step)

    def update(self, step: int, weights: dict[str, Tensor]) -> None:
        """Updates masks and ranges if that is due, before `step` is computed."""
        if self.sparsifier is not None:
            self.sparsifier.update(step, weights)
        if self.int4 is not None:
            self.int4.update(step, {**weights, **self.masked(step, weights)})

    def masked(self, step: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The masked weights, by name."""
        if self.sparsifier is None:
            return {}
        return self.sparsifier.apply_masks(step, {name: weights[name] for name in self.sparsifier.masks})

    def effective(self, step: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights that the model computes with at `step`, if they differ from its own."""
        masked = self.masked(step, weights)
        if self.int4 is None or not self.int4.is_active(step):
            return masked
        return {**self.int4.round_weights({**weights, **masked}), **self.rounded_heads(weights)}

    def rounded_heads(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """kv_b_proj of all layers as w4a8 computes with it."""
        heads, plain = self._latent.num_attention_heads, self._latent.qk_nope_head_dim
        return {
            name: round_heads(weight, heads, plain)
            for name, weight in weights.items()
            if name.endswith("kv_b_proj.weight")
        }


def compressible(model: TrainingModel) -> dict[str, Tensor]:
    """The matrices inside the layers that serving multiplies unchanged, by name."""
    kept_dense = ("router", "kv_b_proj")
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith("layers.") and parameter.dim() > 1 and not any(kind in name for kind in kept_dense)
    }


def check_groups(weights: dict[str, Tensor], group: int) -> None:
    """Raises SettingsError if groups do not fill a matrix: no other tool could read such a checkpoint."""
    for name, weight in weights.items():
        inputs = weight.shape[-1]
        if group < 8 or inputs % group:
            fitting = next(size for size in (128, 64, 32, 16, 8, inputs) if inputs % size == 0)
            raise SettingsError(
                f"{name} has {inputs} inputs, which groups of {group} do not fill; choose group {fitting} (a "
                "multiple of 8 that divides the inputs of every matrix), or change that size of the model"
            )
