"""Ways to make a trained model smaller; they know tensors by name and no model."""
