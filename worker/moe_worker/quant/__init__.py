"""Number formats of weights and activations: rounding to them, packing, and back."""
