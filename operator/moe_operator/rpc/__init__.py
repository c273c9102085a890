"""gRPC calls to workers."""
