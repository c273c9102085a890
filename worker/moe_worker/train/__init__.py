"""Trains a model of the DeepSeek-V3 architecture on text: `moe-worker train`."""
