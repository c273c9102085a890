"""The wire contract of moe-operator: generated gRPC code, and what both sides of it share."""
