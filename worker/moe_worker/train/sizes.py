"""The sizes that pruning can reduce, read from config.json and written back."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from moe_worker.errors import SettingsError

_KEYS = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "experts": "n_routed_experts",
    "channels": "moe_intermediate_size",
    "dense_channels": "intermediate_size",
}


@dataclass(frozen=True)
class ModelSizes:
    """Layers; heads and routed experts of a layer; channels of an expert, and of a dense layer.

    A shared expert is as wide as `n_shared_experts` routed ones, so it shrinks with their channels.
    """

    layers: int
    heads: int
    experts: int
    channels: int
    dense_channels: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> ModelSizes:
        """The sizes in a parsed config.json of the DeepSeek-V3 family."""
        return cls(**{name: int(config[key]) for name, key in _KEYS.items()})

    def write(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config.json with these sizes."""
        changed = {key: getattr(self, name) for name, key in _KEYS.items()}
        return {**config, **changed, "num_key_value_heads": self.heads}

    def towards(self, goal: ModelSizes, share: float, config: dict[str, Any]) -> ModelSizes:
        """Possible sizes on the way to `goal`: experts fill groups, channels are multiples of eight."""
        steps = {"experts": int(config.get("n_group", 1)), "channels": 8, "dense_channels": 8}
        values = {}
        for field in fields(self):
            now, then = getattr(self, field.name), getattr(goal, field.name)
            step = steps.get(field.name, 1)
            between = now - (now - then) * share
            values[field.name] = then if share >= 1 else max(then, round(between / step) * step)
        return ModelSizes(**values)

    def check(self, goal: ModelSizes, config: dict[str, Any]) -> None:
        """Raises SettingsError if a model of these sizes cannot be pruned to `goal`."""
        for name in _KEYS:
            now, then = getattr(self, name), getattr(goal, name)
            if not 1 <= then <= now:
                raise SettingsError(f"{name} is {then}; the model has {now}: give 1 to {now}")
        groups, dense = int(config.get("n_group", 1)), int(config.get("first_k_dense_replace", 0))
        per_token, kept = int(config["num_experts_per_tok"]), int(config.get("topk_group", 1))
        if (config.get("routing") or {}).get("levels") and goal.experts != self.experts:
            raise SettingsError(
                f"experts is {goal.experts}; a model with routing.levels cannot lose experts, because "
                f"their groups would no longer fit: keep {self.experts}"
            )
        if goal.experts % groups:
            raise SettingsError(f"experts is {goal.experts}; it must be a multiple of n_group, {groups}")
        if goal.experts // groups * kept < max(per_token, 2 * kept):
            least = -(-max(per_token, 2 * kept) // kept) * groups
            raise SettingsError(
                f"experts is {goal.experts}; with {kept} of {groups} groups kept and {per_token} experts "
                f"a token it must be at least {least}"
            )
        for name in ("channels", "dense_channels"):
            if getattr(goal, name) % 8:
                raise SettingsError(f"{name} is {getattr(goal, name)}; it must be a multiple of 8")
        if goal.layers < dense:
            raise SettingsError(
                f"layers is {goal.layers}; the {dense} dense ones stay, so give {dense} or more"
            )
