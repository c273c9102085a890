"""Which sequences a step computes. Pure: no torch, no clock, no threads."""
