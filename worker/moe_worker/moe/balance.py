"""The load-balance coefficient: experts with little load get a better score, 1 / (load + eps).

Legend: E routed experts.
"""

from torch import Tensor

# Added to loads, which are relative to their mean.
EPSILON = 1e-2


def coefficient(load_E: Tensor, strength: float) -> Tensor:
    """min(1, 1 / (load + eps)) ** strength for each expert, loads relative to their mean: float32 [E].

    Experts with the mean load or less have 1, so that it is the busiest ones that give tokens away.
    load_E: any measure of work, not negative; only its proportions matter.
    """
    relative_E = load_E.float() / load_E.float().mean().clamp(min=1e-20)
    return (1 / (relative_E + EPSILON)).clamp(max=1.0) ** strength


def nudge(load_E: Tensor, strength: float, margin: float) -> Tensor:
    """What the coefficient adds to the scores by which experts are chosen: float32 [E], 0 to `margin`.

    An expert takes the place of another one only if their scores differ by less than `margin`, so quality is
    bounded; the weights of the chosen experts stay those of their own scores.
    """
    return margin * coefficient(load_E, strength)


def utilisation(load_E: Tensor) -> float:
    """The mean load over the largest one: 1 where experts share the work evenly."""
    return float(load_E.float().mean() / load_E.float().max().clamp(min=1e-20))
