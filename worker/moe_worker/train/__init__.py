"""Trains a DeepSeek-V3-architecture model from text; `moe-worker train` is its face."""
