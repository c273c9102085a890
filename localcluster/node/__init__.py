"""What runs as the node: namespaces, mounts, keys, and the supervisor of the Kubernetes components."""
