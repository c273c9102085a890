"""The part of a model that one process holds and computes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_worker.moe.dispatch import LOCAL, Dispatch


@dataclass(frozen=True)
class Stage:
    """Layers `begin` to `end` (not included) of `of`.

    The first stage embeds tokens, the last one computes logits; hidden states go from stage to stage.
    experts: for each layer whose experts are spread over ranks, the routed experts of this rank, in the order
    of their places; a layer that is absent has all experts. dispatches: for the same layers, the exchange of
    tokens with other ranks.
    """

    begin: int
    end: int
    of: int
    experts: Mapping[int, Sequence[int]] = field(default_factory=dict)
    dispatches: Mapping[int, Dispatch] = field(default_factory=dict)

    @classmethod
    def whole(cls, layers: int) -> "Stage":
        """All layers, with all experts."""
        return cls(0, layers, layers)

    @property
    def first(self) -> bool:
        """Whether it embeds tokens."""
        return self.begin == 0

    @property
    def last(self) -> bool:
        """Whether it computes logits."""
        return self.end == self.of

    @property
    def layers(self) -> range:
        """Numbers of its layers."""
        return range(self.begin, self.end)

    def dispatch(self, layer: int) -> Dispatch:
        """The dispatch of `layer`."""
        return self.dispatches.get(layer, LOCAL)
