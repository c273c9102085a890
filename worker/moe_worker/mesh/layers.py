"""Which layers each pipeline stage has: pure."""

from collections.abc import Sequence

from moe_worker.errors import SettingsError


def layer_ranges(nbytes_L: Sequence[int], stages: int, before: int = 0, after: int = 0) -> list[range]:
    """Layers of each stage, one behind the other, so that the largest stage has as few bytes as can be.

    nbytes_L: of each layer. before, after: bytes that the first stage (the embedding) and the last (the head)
    hold in addition to their layers. Every stage has a layer; SettingsError where there are too few.
    """
    if stages > len(nbytes_L):
        raise SettingsError(
            f"{stages} pipeline stages need as many layers; the model has {len(nbytes_L)}: use fewer stages"
        )
    sizes = list(nbytes_L)
    sizes[0] += before
    sizes[-1] += after
    least, most = max(sizes), sum(sizes)
    while least < most:
        middle = (least + most) // 2
        if len(_fill(sizes, stages, middle)) <= stages:
            most = middle
        else:
            least = middle + 1
    ends = _fill(sizes, stages, least)
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def _fill(sizes: Sequence[int], stages: int, limit: int) -> list[int]:
    """Where stages end that take layers up to `limit` bytes, but leave one for each stage behind them."""
    ends: list[int] = []
    taken = 0
    for layer, size in enumerate(sizes):
        left = len(sizes) - layer  # this layer and those behind it
        if taken and (taken + size > limit or left <= stages - len(ends) - 1):
            ends.append(layer)
            taken = 0
        taken += size
    return [*ends, len(sizes)]
