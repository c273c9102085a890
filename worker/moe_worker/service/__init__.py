"""The gRPC edge. The engine runs in a process of its own."""
