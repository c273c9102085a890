"""Compression methods; they know tensors by name and no model."""
