"""Random numbers as a function of (seed, index): the same in any batch, on any device, after any preemption.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). This is the plain
form; `draw.uniforms` computes the same numbers for a batch on the device.
"""

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
# (bits to shift right, factor) of each round of the mixing function; the last round only shifts.
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) for token `index` of the request with `seed` (0 to 2^64 - 1)."""
    return (mix((mix(seed) + (index + 1) * GOLDEN) & MASK) >> 11) / 2**53


def mix(state: int) -> int:
    """Spreads the 64 bits of `state` over one another, one to one."""
    for shift, factor in ROUNDS:
        state = ((state ^ (state >> shift)) * factor) & MASK
    return state ^ (state >> LAST_SHIFT)


def signed(value: int) -> int:
    """The 64 bits of `value` as torch.int64 holds them."""
    return value - 2**64 if value >= 2**63 else value
