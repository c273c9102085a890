"""Measures the speed of a checkpoint on this machine: `moe-worker bench`."""
