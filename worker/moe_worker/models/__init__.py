"""Reading checkpoints, and the models built from them."""
