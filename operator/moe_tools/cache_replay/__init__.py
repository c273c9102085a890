"""Simulates caches on a recorded trace: `moe replay --cache`. Pure."""
