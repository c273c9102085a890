"""`moe load`: replays a recorded trace against a deployment."""
