"""The gRPC edge. The engine runs in a separate process."""
