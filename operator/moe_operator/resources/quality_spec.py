"""User input: the allowed quality loss of a compressed checkpoint (spec.quality)."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from moe_operator.resources import quantity
from moe_operator.resources.base import Model, rules
from moe_operator.resources.pods import Quantity, quantity_between


class Quality(Model):
    """The allowed quality loss of a compressed checkpoint."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.maxLoss) || has(self.maxBitsPerByteIncrease)",
                "maxLoss is required: the allowed loss in bits per byte, e.g. 5m",
            )
        )
    )

    max_loss: Quantity | None = Field(
        default=None,
        description="Allowed increase of the checkpoint's bits per byte over its original, according to "
        "the quality.json that `moe-worker compress` stores with the weights: a quantity from 0 to 100, such "
        "as 5m. A worker does not load a checkpoint that is worse, or that has no such file. Required.",
        json_schema_extra=rules(
            (
                quantity_between("0", "100"),
                "maxLoss is a quantity of bits per byte from 0 to 100, e.g. 5m",
            )
        ),
    )
    max_bits_per_byte_increase: float | None = Field(
        default=None,
        description="Deprecated: use maxLoss, which takes precedence. Default: none.",
        json_schema_extra=rules(("self >= 0.0 && self <= 100.0", "give a number of bits from 0 to 100")),
    )
    text: str | None = Field(
        default=None,
        description="Name of the text that must have been scored, as quality.json has it. Default: any.",
        min_length=1,
        max_length=128,
        pattern="^[A-Za-z0-9._/-]+$",
    )

    @property
    def loss_most(self) -> float:
        """Bits per byte that the checkpoint may have more than its original."""
        if self.max_loss is not None:
            return float(quantity.parse(self.max_loss))
        return self.max_bits_per_byte_increase or 0.0
