"""The latent KV cache."""
