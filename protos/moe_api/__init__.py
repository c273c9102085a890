"""The wire contract of moe-operator: generated gRPC code, and code that both sides share."""
