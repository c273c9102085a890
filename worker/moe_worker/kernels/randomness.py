"""Noise as a function of (seed, index, lane): equal in any batch, on any device, after any preemption.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), split twice: the
seed and the token's index give a state, the state and the lane give 64 bits. This is the plain form;
`draw.exponentials` computes the same numbers for a batch on the device.
"""

import math

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
# (bits to shift right, factor) of each round of the mixing function; the last round only shifts.
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31
# Bits of a uniform number. With half a step added it fits a float64 and is neither 0 nor 1.
UNIFORM_BITS = 52


def exponential(seed: int, index: int, lane: int) -> float:
    """The number of `lane` for token `index` of the request with `seed` (0 to 2^64 - 1).

    Numbers are independent and exponentially distributed with mean 1.
    """
    bits = split(split(mix(seed), index), lane)
    return -math.log(((bits >> (64 - UNIFORM_BITS)) + 0.5) / 2**UNIFORM_BITS)


def split(state: int, number: int) -> int:
    """Output `number` of the SplitMix64 generator that starts from `state`."""
    return mix((state + (number + 1) * GOLDEN) & MASK)


def mix(state: int) -> int:
    """Spreads the 64 bits of `state` over one another, one to one."""
    for shift, factor in ROUNDS:
        state = ((state ^ (state >> shift)) * factor) & MASK
    return state ^ (state >> LAST_SHIFT)


def signed(value: int) -> int:
    """The 64 bits of `value` as torch.int64 holds them."""
    return value - 2**64 if value >= 2**63 else value
