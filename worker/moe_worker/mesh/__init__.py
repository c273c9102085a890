"""A replica of several processes: pipeline stages, each of ranks that share the experts of its layers."""
