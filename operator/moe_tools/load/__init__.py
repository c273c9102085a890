"""`moe load`: a recorded trace, played against a deployment."""
