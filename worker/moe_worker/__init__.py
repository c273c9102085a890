"""The worker: loads a Mixture-of-Experts model and serves it over gRPC, or runs it as a library."""
